"""Through the real engine, a request gives the same bits alone and in any mix, in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import exactness
from support.exactness import NATIVE_MODES, Ways

from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library

MIXES = 200


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


def went_through_everything(ways: Ways) -> None:
    for name in ("chunks", "cached", "preempted", "resumed", "samples", "sampled"):
        # A mix is a function of its number: these counts do not change by chance.
        assert ways.counts[name] >= 3, str(ways)


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
