"""What n samples of one prompt cost: the time to all their first tokens, beside that of one sample.

    python -m benchmarks.samples [--model smollm2] [--prompt 512] [--samples 16]

Prompts in turns, each a new one, so that nothing comes from the prefix cache; native kernel, bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import torch

from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.quality import runner_of
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams

BLOCKS = 1024


def seconds_of(core: EngineCore, number: int, length: int, samples: int) -> float:
    """From an idle engine to the first token of every sample."""
    prompt = tuple((number * 7919 + i * 31) % 40_000 for i in range(length))
    indices, outputs = tuple(range(samples)), ((),) * samples
    core.add(EngineRequest(number, prompt, SamplingParams(seed=number), StoppingParams(1), indices, outputs))
    begin = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    checkpoint = checkpoint_of(options.model, "bfloat16", options.cache_dir)
    runner = runner_of(checkpoint, "bfloat16", torch.get_num_threads(), BLOCKS)
    limits = EngineLimits(
        num_blocks=BLOCKS, block_size=16, max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=2048
    )
    core = EngineCore(runner, limits, clock=time.monotonic)
    seconds: dict[int, list[float]] = {1: [], options.samples: []}
    for number in range(2 * options.repeats + 2):  # the first two warm up
        samples = (1, options.samples)[number % 2]
        taken = seconds_of(core, number, options.prompt, samples)
        if number > 1:
            seconds[samples].append(taken)
    one, many = (statistics.median(taken) for taken in seconds.values())
    print(
        f"first tokens after a prompt of {options.prompt}: {1e3 * one:.0f} ms of one sample, "
        f"{1e3 * many:.0f} ms of {options.samples}: {many / one:.3f} prefills"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
