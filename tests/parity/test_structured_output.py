"""Structured output from a real model: valid in a crowd, alone, cut, with drafts; neighbours unchanged."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from support.checkpoints import EOS
from support.stack import CPU
from unit.test_engine_core import Sink, request

from salver.model.cache import KVCache
from salver.model.loader import load_model
from salver.model.tokenizer import Tokenizer
from salver.server.engine.core import EngineLimits
from salver.server.engine.drafts import PromptLookup, Speculation, StepCosts
from salver.server.engine.grammar import Grammars, load_vocabulary
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, FinishReason, SamplingParams, StoppingParams
from salver.server.engine.runner import ModelRunner
from salver.server.grammar_check import grammar_of

LIMITS = EngineLimits(
    num_blocks=60, block_size=16, max_model_len=200, max_num_seqs=16, max_num_batched_tokens=96,
    check_integrity=True,
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 999},
        "s": {"type": "string", "maxLength": 5},
        "l": {"type": "array", "items": {"enum": ["in", "on", True]}, "maxItems": 3},
    },
    "required": ["n", "l"],
    "additionalProperties": False,
}
FORMS = [
    ("json_schema", json.dumps(SCHEMA)),
    ("regex", "(the |in ){2,3}[0-9]{4}"),
    ("choice", ["other", "than"]),
]


def valid(kind: int, text: str) -> bool:
    if kind == 0:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    return bool(re.fullmatch(FORMS[1][1], text)) if kind == 1 else text in FORMS[2][1]


def asked() -> list[EngineRequest]:
    """Every second one is free; greedy and sampled, one or two samples."""
    made = []
    for i in range(12):
        sampling = SamplingParams(temperature=0.0) if i % 4 < 2 else SamplingParams(temperature=1.3, seed=i)
        item = request(i, [i, *([40, 41, 42] * 5)], n=1 + i % 3 % 2, sampling=sampling)
        stopping = StoppingParams(90, stop_token_ids=frozenset([EOS]))
        item = replace(item, stopping=stopping, arrival=0.0, output_top_k=1)
        if i % 2:
            item = replace(item, grammar=grammar_of(*FORMS[i // 2 % 3]))
        made.append(item)
    return made


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> ModelRunner:
    model = load_model(tiny_llama, device=CPU, dtype=torch.float32, numerics="exact")
    cache = KVCache(model.spec, LIMITS.num_blocks, LIMITS.block_size, dtype=torch.float32, device=CPU)
    grammars = Grammars(lambda: load_vocabulary(tiny_llama))
    return ModelRunner(model, cache, block_size=LIMITS.block_size, row_multiple=4, grammars=grammars)


def answers(
    runner: ModelRunner, items: list[EngineRequest], *, drafts: bool = False, limits: EngineLimits = LIMITS
) -> tuple[list[Sink], InlineEngine]:
    costs = StepCosts([(1, 1.0), (1000, 1.0)])  # so that drafts are always worth their rows
    speculation = Speculation(PromptLookup(), costs, max_drafts=4) if drafts else None
    engine = InlineEngine(runner, limits, clock=time.monotonic, speculation=speculation)
    sinks = [Sink() for _ in items]
    for item, sink in zip(items, sinks, strict=True):
        engine.submit(item, sink)
    engine.run(max_steps=2000)
    assert engine.core.pool.num_used == 0
    return sinks, engine


@pytest.fixture(scope="module")
def plain(runner: ModelRunner) -> list[dict[int, list[int]]]:
    return [sink.tokens for sink in answers(runner, asked())[0]]


def test_what_ends_by_itself_is_valid(runner: ModelRunner, tiny_llama: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny_llama)
    sinks, _ = answers(runner, asked())
    stopped = 0
    for i, sink in enumerate(sinks):
        for index, output in sink.finish.items():
            text = tokenizer.decode(sink.tokens[index], continuation=True)
            if i % 2 and output.finish_reason is FinishReason.STOP:
                stopped += 1
                assert valid(i // 2 % 3, text), text
            assert output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert stopped >= 5


def test_neighbours_do_not_notice(runner: ModelRunner, plain: list[dict[int, list[int]]]) -> None:
    free = [item for item in asked() if not item.grammar]
    assert [sink.tokens for sink in answers(runner, free)[0]] == plain[::2]
    for item, tokens in zip(asked(), plain, strict=True):
        assert answers(runner, [item])[0][0].tokens == tokens, "alone"


def test_drafts_and_preemption_change_nothing(runner: ModelRunner, plain: list[dict[int, list[int]]]) -> None:
    sinks, engine = answers(runner, asked(), drafts=True)
    assert [sink.tokens for sink in sinks] == plain
    speculation = engine.core.scheduler.speculation
    assert speculation is not None and speculation.num_accepted > 0
    few, engine = answers(runner, asked(), drafts=True, limits=replace(LIMITS, num_blocks=14))
    assert [sink.tokens for sink in few] == plain
    assert engine.core.scheduler.preemptions > 0


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_resumed_output_goes_on_as_it_would_have(
    runner: ModelRunner, plain: list[dict[int, list[int]]], cut: int
) -> None:
    items = []
    for item, tokens in zip(asked(), plain, strict=True):
        outputs = tuple(tuple(tokens[i][: min(cut, len(tokens[i]) - 1)]) for i in item.sample_indices)
        items.append(replace(item, outputs=outputs))
    for item, sink, tokens in zip(items, answers(runner, items)[0], plain, strict=True):
        for index, had in zip(item.sample_indices, item.outputs, strict=True):
            assert [*had, *sink.tokens[index]] == tokens[index]


def test_tokens_that_the_grammar_does_not_allow_end_the_sample_alone(
    runner: ModelRunner, plain: list[dict[int, list[int]]]
) -> None:
    items = asked()
    wrong = replace(items[1], outputs=((40, 40),), sample_indices=(0,))
    sinks, _ = answers(runner, [items[0], wrong])
    assert sinks[0].tokens == plain[0]
    assert sinks[1].finish[0].finish_reason is FinishReason.ABORT
    assert sinks[1].tokens[0] == []
