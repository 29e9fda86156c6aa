"""With and without drafts: the same tokens and log-probabilities, to the bit, from real models."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.stack import CPU
from unit.test_engine_core import Sink, request

from salver.model.cache import KVCache
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library, Precision
from salver.model.kernels.program import NativeTransformer
from salver.model.loader import load_model
from salver.server.engine.core import EngineLimits
from salver.server.engine.draft_model import DraftModel
from salver.server.engine.drafts import Drafter, PromptLookup, Speculation, StepCosts
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    EngineRequest,
    Logprobs,
    SamplingParams,
    SequenceOutput,
    StoppingParams,
)
from salver.server.engine.runner import ModelRunner

BLOCKS, BLOCK_SIZE = 80, 16
LIMITS = EngineLimits(
    num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_model_len=256, max_num_seqs=16,
    max_num_batched_tokens=96, check_integrity=True,
)  # fmt: skip
# So that drafts are always worth their rows.
FREE = StepCosts([(1, 1.0), (1000, 1.0)])
NOTHING = StepCosts([(1, 0.0)])
REPEATING = [40, 41, 42, 43, 44, 45] * 5
SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.3),
    SamplingParams(temperature=0.6, top_k=5, seed=3),
    SamplingParams(temperature=1.0, top_p=0.8, presence_penalty=0.4, seed=4),
    SamplingParams(temperature=0.8, min_p=0.05, logit_bias=((42, 4.0), (7, -3.0)), seed=5),
    SamplingParams(temperature=0.9, typical_p=0.7, no_repeat_ngram_size=6, seed=8),
    SamplingParams(temperature=0.0, bad_words=((40, 41), (7,)), logit_bias=((40, 9.0), (41, 9.0))),
    SamplingParams(allowed_words=((40, 41, 42), (43, 44), (45,)), seed=9),
    # So that it repeats itself: one token again and again, and any order of three.
    SamplingParams(temperature=0.0, logit_bias=((42, 100.0),)),
    SamplingParams(temperature=1.0, logit_bias=((40, 30.0), (41, 30.0), (42, 30.0)), seed=6),
]


def asked() -> list[EngineRequest]:
    made = []
    for i, sampling in enumerate(SAMPLINGS):
        item = request(i, [i, *REPEATING], n=1 + i % 2, sampling=sampling, output_top_k=3)
        stopping = StoppingParams(60, min_tokens=20 * (i % 2), stop_token_ids=frozenset([1, 9, 30 + i]))
        made.append(replace(item, stopping=stopping, arrival=0.0))
    return made


class Recording(Sink):
    def __init__(self) -> None:
        super().__init__()
        self.logprobs: dict[int, list[Logprobs]] = {}

    def put(self, output: SequenceOutput) -> None:
        super().put(output)
        told = output.logprobs or []
        assert len(told) == len(output.token_ids)
        self.logprobs.setdefault(output.sample_index, []).extend(told)


@pytest.fixture(scope="module", params=["native float32", "native bfloat16", "torch float32"])
def way(request: pytest.FixtureRequest, cache_dir: Path) -> tuple[Library | None, torch.dtype]:
    kernels, dtype = request.param.split()
    if kernels == "torch":
        return None, torch.float32
    try:
        return Library(build.find_or_build(cache_dir)), getattr(torch, dtype)
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


def runner(
    checkpoint: Path, way: tuple[Library | None, torch.dtype], num_blocks: int = BLOCKS
) -> ModelRunner:
    library, dtype = way
    model = load_model(checkpoint, device=CPU, dtype=dtype, numerics="exact")
    cache = KVCache(model.spec, num_blocks, BLOCK_SIZE, dtype=dtype, device=CPU)
    if library is None:
        return ModelRunner(model, cache, block_size=BLOCK_SIZE, row_multiple=4)
    precision = Precision.FLOAT32 if dtype == torch.float32 else Precision.BFLOAT16
    native = NativeTransformer(model, cache, library, precision=precision, threads=1)
    return ModelRunner(native, cache, block_size=BLOCK_SIZE, row_multiple=1)


Answers = list[tuple[dict[int, list[int]], dict[int, list[Logprobs]]]]


def answers(runner: ModelRunner, drafter: Drafter | None = None) -> tuple[Answers, InlineEngine]:
    speculation = None if drafter is None else Speculation(drafter, FREE, max_drafts=5)
    engine = InlineEngine(runner, LIMITS, clock=time.monotonic, speculation=speculation)
    sinks = [Recording() for _ in SAMPLINGS]
    for item, sink in zip(asked(), sinks, strict=True):
        engine.submit(item, sink)
    engine.run(max_steps=500)
    assert engine.core.pool.num_used == 0
    return [(sink.tokens, sink.logprobs) for sink in sinks], engine


def accepted(engine: InlineEngine) -> int:
    assert engine.core.scheduler.speculation is not None
    return engine.core.scheduler.speculation.num_accepted


def agree(ours: Answers, theirs: Answers, way: tuple[Library | None, torch.dtype]) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    if way[0] is not None:  # plain torch promises the tokens
        assert ours == theirs


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, way: tuple[Library | None, torch.dtype]) -> tuple[Answers, int]:
    found, engine = answers(runner(tiny_llama, way))
    assert sum(len(tokens) for samples, _ in found for tokens in samples.values()) > 100
    return found, engine.core.steps


def test_with_what_was_said_before(tiny_llama: Path, way, plain) -> None:
    found, engine = answers(runner(tiny_llama, way), PromptLookup())
    agree(found, plain[0], way)
    assert accepted(engine) > 0


def test_with_the_model_as_its_own_draft(tiny_llama: Path, way, plain) -> None:
    drafter = DraftModel(runner(tiny_llama, way), NOTHING, max_tokens=96)
    found, engine = answers(runner(tiny_llama, way), drafter)
    agree(found, plain[0], way)
    # It knows the noise, so sampled tokens are guessed as well as greedy ones.
    speculation = engine.core.scheduler.speculation
    assert speculation is not None
    assert speculation.num_accepted > 0.9 * speculation.num_drafts > 50
    assert engine.core.steps < plain[1] / 2
    drafter.check_integrity()
    assert drafter.num_used_blocks == 0


@pytest.mark.parametrize(("blocks", "chunk"), [(BLOCKS, 8), (9, 96)], ids=["slow to read", "few blocks"])
def test_with_another_model_as_draft(tiny_llama, tiny_gpt2, way, plain, blocks: int, chunk: int) -> None:
    drafter = DraftModel(runner(tiny_gpt2, way, blocks), NOTHING, max_tokens=chunk)
    found, _ = answers(runner(tiny_llama, way), drafter)
    agree(found, plain[0], way)
    drafter.check_integrity()
    assert drafter.num_used_blocks == 0
