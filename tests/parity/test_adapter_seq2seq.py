"""Adapters of encoder-decoders against peft: source and output, alone and in one batch with the base."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import exactness
from support.adapters import AdaptedStack, norms_of, write_random_adapter
from support.seq2seq import VARIANTS, logits_of, write
from support.stack import random_prompts
from unit.test_engine_core import Sink

from salver.model.adapters import AdapterBase, AdapterSet, load_adapter
from salver.model.errors import CheckpointError
from salver.model.transformer import Transformer
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SamplingParams, SequenceOutput, StoppingParams

TOLERANCE = 2e-3
# One of each family, and what differs for adapters: embeddings of their own, a head of its own.
FAMILIES = [name for name in VARIANTS if name.endswith((" plain", " own", " flan"))]

pytestmark = pytest.mark.usefixtures("one_thread")


def is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def kinds_of(model: Any) -> dict[str, dict[str, Any]]:
    """Every way of adapting an encoder-decoder, as fields of LoraConfig."""
    read = [n for n, m in model.named_modules() if "encoder." in n and "decoder." not in n and is_linear(m)]
    linear = {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
    return {
        "lora": {**linear, "r": 3, "lora_alpha": 5, "use_rslora": True},
        "dora": {**linear, "r": 2, "lora_alpha": 3, "use_dora": True, "bias": "all"},
        "source": {"target_modules": read, "r": 2},
        "embed": {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "lora_alpha": 6, "use_dora": True},
        "read": {"target_modules": [r"encoder.embed_tokens"], "r": 2},
        "bias": {"target_modules": ["lm_head"], "r": 2, "lora_bias": True},
        "saved": {**linear, "r": 2, "modules_to_save": [*norms_of(model), "decoder.embed_tokens", "lm_head"]},
    }  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_computes(name: str, tmp_path: Path) -> None:
    reference = write(tmp_path, VARIANTS[name])
    stack = AdaptedStack(tmp_path)
    model = cast(Transformer, stack.model)
    base, loaded, theirs = AdapterBase.of(model), {}, {}
    for seed, (kind, config) in enumerate(kinds_of(reference).items()):
        theirs[kind] = write_random_adapter(reference, tmp_path / kind, seed, **config)
        loaded[kind] = load_adapter(tmp_path / kind, base)
    stack.put(AdapterSet(model, loaded, 4))
    (source,) = ([4 + i for i in ids] for ids in random_prompts(60, [17]))
    (output,) = ([4 + i for i in ids] for ids in random_prompts(60, [9], seed=1))
    truth = {kind: logits_of(theirs.get(kind, reference), source, output) for kind in ("", *loaded)}
    for kind, expected in truth.items():
        assert not kind or float((expected - truth[""]).abs().max()) > 10 * TOLERANCE, f"{kind} does nothing"
    stack.names = dict(enumerate(truth))
    stack.read(dict.fromkeys(stack.names, source))
    crowd = stack.step([(number, output) for number in stack.names], padding=3)
    for (kind, expected), found in zip(truth.items(), crowd, strict=True):
        assert float((found - expected).abs().max()) < TOLERANCE, f"{kind} in a crowd"
    for kind, expected in truth.items():
        stack.names[-1] = kind
        stack.read({-1: source})
        assert float((stack.logits(output, 4) - expected).abs().max()) < TOLERANCE, f"{kind} alone"
        stack.free += stack.sources.pop(-1)[0]


class Scores(Sink):
    """Keeps the tokens' log-probabilities too."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[float] = []

    def put(self, output: SequenceOutput) -> None:
        super().put(output)
        self.logprobs += [told.logprob for told in output.logprobs or []]


def test_in_the_engine(tmp_path: Path) -> None:
    """Adapters and the base in one batch and alone; sources are read in the step, or cached."""
    reference = write(tmp_path, VARIANTS["Marian paper"])
    runner = exactness.runner_of(tmp_path, "float32", None)
    model = cast(Transformer, runner.model)
    base, loaded, theirs = AdapterBase.of(model), {}, {"": reference}
    for seed, kind in enumerate(("lora", "source", "read")):
        theirs[kind] = write_random_adapter(reference, tmp_path / kind, seed, **kinds_of(reference)[kind])
        loaded[kind] = load_adapter(tmp_path / kind, base)
    runner.adapters = AdapterSet(model, loaded, runner.row_multiple)
    sources = [[4 + i for i in ids] for ids in random_prompts(60, [21, 5])]
    asked = [(name, source) for source in sources for name in theirs]
    limits = replace(exactness.ROOMY, max_source_len=32)
    engine = InlineEngine(runner, limits, clock=itertools.count().__next__)
    crowd = answers(engine, asked)
    for (name, source), (tokens, logprobs) in zip(asked, crowd, strict=True):
        expected = logits_of(theirs[name], source, [3, *tokens[:-1]]).log_softmax(-1)
        assert expected.argmax(-1).tolist() == tokens
        assert logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)
        assert answers(engine, [(name, source)]) == [(tokens, logprobs)], "alone"
    assert len({str(answer) for answer in crowd}) == len(asked), "each says something else"


def answers(engine: InlineEngine, asked: list[tuple[str, list[int]]]) -> list[tuple[list[int], list[float]]]:
    sinks = [Scores() for _ in asked]
    for number, ((name, source), sink) in enumerate(zip(asked, sinks, strict=True)):
        request = EngineRequest(
            number, (3,), SamplingParams(temperature=0.0), StoppingParams(8), outputs=((),), adapter=name,
            source_token_ids=tuple(source), num_start_tokens=1, output_top_k=0,
        )  # fmt: skip
        engine.submit(request, sink)
    engine.run()
    return [(sink.tokens[0], sink.logprobs) for sink in sinks]


def test_the_matrix_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    """`shared` holds the embeddings of encoder and decoder, which read it under names of their own."""
    reference = write(tmp_path, VARIANTS["Bart plain"])
    base = AdapterBase.of(AdaptedStack(tmp_path).model)
    write_random_adapter(reference, tmp_path / "lora", 0, target_modules=["shared"], r=2)
    with pytest.raises(CheckpointError, match=r"shared\.lora_embedding_A is of no layer of this model"):
        load_adapter(tmp_path / "lora", base)
