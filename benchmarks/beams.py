"""What beam search costs: a step of beams beside a step of as many samples of one prompt.

    python -m benchmarks.beams [--model smollm2] [--beams 4] [--requests 1]

The native kernel where it can be had; requests of the two kinds in turns, in one engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import inline_engine
from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from salver.server.engine.core import EngineCore
from salver.server.engine.request import BeamParams, EngineRequest, SamplingParams

PROMPT, TOKENS = 128, 64


def samples(number: int, count: int) -> EngineRequest:
    prompt = [1000 + 37 * number + place for place in range(PROMPT)]
    plain = inline_engine.request(number, prompt, TOKENS)
    return replace(
        plain, sampling=SamplingParams(seed=number), sample_indices=tuple(range(count)), outputs=((),) * count
    )


def search(number: int, count: int) -> EngineRequest:
    return replace(samples(number, count), sampling=SamplingParams(temperature=0.0), beams=BeamParams(count))


def step_seconds(core: EngineCore, requests: list[EngineRequest]) -> float:
    """The median step in which nothing but tokens of the output is computed."""
    for request in requests:
        core.add(request)
    seconds = []
    while core.has_work:
        message = core.step()
        if message is not None and message.stats is not None and not message.stats.num_prefill_tokens:
            seconds.append(message.stats.duration)
    return statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    checkpoint = checkpoint_of(args.model, args.dtype, default_cache_dir())
    core, ready = inline_engine.start(checkpoint, dtype=args.dtype, threads=args.threads)
    made = {"samples": samples, "beams": search}
    found: dict[str, list[float]] = {name: [] for name in made}
    number = 0
    for _ in range(args.rounds):
        for name, make in made.items():
            requests = [make(number + place, args.beams) for place in range(args.requests)]
            number += args.requests
            found[name].append(step_seconds(core, requests))
    print(f"{args.model}, {args.dtype}, kernels {ready.kernels}: {args.requests} requests of {args.beams}")
    for name, seconds in found.items():
        print(f"{name:8} {1000 * min(seconds):7.2f} ms a step (of {args.rounds} rounds the best)")
    print(f"beams / samples: {min(found['beams']) / min(found['samples']):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
