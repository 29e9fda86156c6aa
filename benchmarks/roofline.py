"""What the machine itself can do: memory bandwidth and matrix products, with torch's own kernels.

In a process of its own (`python benchmarks/roofline.py --threads N`, one JSON object on standard output), so
that its threads and memory are gone before anything else is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

SECONDS = 0.8
"""Spent on each of the three."""
ARRAY_BYTES = 256 << 20  # far beyond any cache
M = K = N = 2048  # large enough to reach the units' speed, and to show it in a few calls


def best_rate(work: float, call: Callable[[], object]) -> float:
    """Work done per second in the fastest call within SECONDS: the ceiling, not the average."""
    call()
    fastest = float("inf")
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - started)
    return work / fastest


def measure() -> dict[str, float]:
    """Bytes read per second, bfloat16 FLOP/s and int8 OP/s (a multiply and an add are two)."""
    array = torch.ones(ARRAY_BYTES // 8, dtype=torch.int64)
    left = torch.randn(M, K).to(torch.bfloat16)
    right = torch.randn(N, K).to(torch.bfloat16)
    left8 = torch.randint(-127, 127, (M, K), dtype=torch.int8)
    right8 = torch.randint(-127, 127, (N, K), dtype=torch.int8).t()
    with torch.inference_mode():
        return {
            "memory": best_rate(ARRAY_BYTES, array.sum),
            "bf16": best_rate(2 * M * K * N, lambda: torch.nn.functional.linear(left, right)),
            "int8": best_rate(2 * M * K * N, lambda: torch._int_mm(left8, right8)),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    print(json.dumps(measure()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
