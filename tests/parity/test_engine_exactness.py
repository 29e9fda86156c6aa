"""Through the real engine, a request gives the same bits alone and in any mix, in every precision."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import decoders, exactness
from support.exactness import NATIVE_MODES, Ways
from support.stack import random_prompts

from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams

MIXES = 200
# Whose answers could depend on company in ways of their own: growing ropes, windows, experts, ALiBi, sinks.
DECODERS = (
    "Llama dynamic",
    "Llama longrope",
    "Phi3 longrope",
    "Gemma2 plain",
    "Qwen2Moe mixed",
    "DeepseekV3 plain",
    "GptOss plain",
    "Bloom six",
)


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


def went_through_everything(ways: Ways, least: int = 3) -> None:
    for name in ("chunks", "cached", "preempted", "resumed", "samples", "sampled", "beams"):
        # A mix is a function of its number: these counts do not change by chance.
        assert ways.counts[name] >= least, str(ways)


def test_the_same_bits_in_any_mix(library: Library, tiny_llama: Path, tiny_gpt2: Path) -> None:
    runners = [
        exactness.runner_of(path, mode, library) for path in (tiny_llama, tiny_gpt2) for mode in NATIVE_MODES
    ]
    ways = Ways()
    for seed in range(MIXES):
        runner = runners[seed % len(runners)]
        assert not list(exactness.run_mix(runner, seed, ways, bits=True)), f"mix {seed}"
    went_through_everything(ways)


def test_the_same_tokens_in_torch(tiny_llama: Path, tiny_gpt2: Path) -> None:
    runners = [exactness.runner_of(path, "float32", None) for path in (tiny_llama, tiny_gpt2)]
    ways = Ways()
    for seed in range(MIXES // 5):
        runner = runners[seed % len(runners)]
        assert not list(exactness.run_mix(runner, seed, ways, bits=False)), f"mix {seed}"
    went_through_everything(ways)


@pytest.mark.parametrize(
    ("name", "shared"),
    [("Llama dynamic", (0, 16, 0, 0)), ("Llama longrope", (0, 16, 0, 48)), ("Llama yarn", (0, 16, 16, 48))],
)
def test_prompts_share_what_has_the_same_positions(
    name: str, shared: tuple[int, ...], tmp_path: Path, one_thread: None
) -> None:
    """A rope that grows makes other keys of the same tokens in a longer prompt."""
    decoders.write(tmp_path, decoders.VARIANTS[name])
    runner = exactness.runner_of(tmp_path, "float32", None)
    limits = replace(exactness.ROOMY, enable_prefix_caching=True, rope_context=runner.model.spec.rope_context)
    draw = random.Random(5)
    stem = tuple(draw.randrange(decoders.VOCAB) for _ in range(70))
    requests = [
        EngineRequest(
            request_id=length,
            prompt_token_ids=stem[:length],
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(6),
            sample_indices=(0,),
            outputs=((),),
        )
        for length in (20, 24, 50, 65)
    ]
    alone = [exactness.Answer() for _ in requests]
    for request, answer in zip(requests, alone, strict=True):
        run(InlineEngine(runner, limits, clock=itertools.count().__next__), request, answer)
    together = InlineEngine(runner, limits, clock=itertools.count().__next__)
    for request, expected, cached in zip(requests, alone, shared, strict=True):
        answer = exactness.Answer()
        run(together, request, answer)
        assert (answer.tokens, answer.cached) == (expected.tokens, cached)


@pytest.mark.parametrize("name", ["Phi3 longrope", "Llama longrope", "Llama dynamic"])
def test_growing_beyond_the_original_context(name: str, tmp_path: Path, one_thread: None) -> None:
    """As transformers generates: Phi-3 computes everything again at that point, others go on."""
    reference = decoders.write(tmp_path, decoders.VARIANTS[name])
    runner = exactness.runner_of(tmp_path, "float32", None)
    limits = replace(exactness.ROOMY, rope_context=runner.model.spec.rope_context)
    (prompt,) = random_prompts(decoders.VOCAB, [20], seed=3)
    ids = torch.tensor([prompt])
    whole = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = whole[0, 20:].tolist()
    assert len(set(expected)) > 3
    request = EngineRequest(
        request_id=1,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(16),
        sample_indices=(0,),
        outputs=((),),
    )
    for begun in (0, 3, 9):  # resumed with so many tokens
        answer = exactness.Answer()
        resumed = replace(request, outputs=(tuple(expected[:begun]),))
        run(InlineEngine(runner, limits, clock=itertools.count().__next__), resumed, answer)
        assert answer.tokens[0] == expected[begun:]
        crossed_again = runner.model.spec.rope_context[1] == "again" and begun < 5
        assert answer.preemptions == crossed_again


def run(engine: InlineEngine, request: EngineRequest, answer: exactness.Answer) -> None:
    engine.submit(request, answer)
    engine.run()


def test_the_same_tokens_of_other_decoders(tmp_path: Path, one_thread: None) -> None:
    ways = Ways()
    for name in DECODERS:
        decoders.write(tmp_path / name, decoders.VARIANTS[name])
    runners = {name: exactness.runner_of(tmp_path / name, "float32", None) for name in DECODERS}
    for seed, name in enumerate(DECODERS * 4):
        assert not list(exactness.run_mix(runners[name], seed, ways, bits=False)), f"mix {seed}, {name}"
    went_through_everything(ways, least=1)
