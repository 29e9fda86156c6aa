"""What LoRA adapters cost a full batch: the base alone, beside the same batch under several adapters.

    python -m benchmarks.adapters [--model smollm2] [--batch 32] [--adapters 8] [--rank 8]

Random adapters of every linear layer, in plain torch, as the server computes them; steps in turns.
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
from salver.model.adapters import Adapter, AdapterSet, Delta
from salver.model.cache import KVCache
from salver.model.layers import Linear
from salver.model.loader import load_model
from salver.model.numerics import row_multiple
from salver.model.transformer import Transformer
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
from salver.server.engine.runner import ModelRunner

CPU = torch.device("cpu")


def random_adapter(model: Transformer, rank: int) -> Adapter:
    """Of every linear layer but the head."""
    deltas = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and name != "head":
            out, width = layer.weight.shape
            a, b = torch.randn(rank, width) / width**0.5, 0.01 * torch.randn(out, rank)
            deltas[name] = [Delta(0, a.to(model.dtype), b.to(model.dtype))]
    return Adapter(deltas, "")


def core_of(checkpoint: Path, batch: int, num_adapters: int, rank: int) -> EngineCore:
    """An engine in which `batch` sequences decode, each under one of the adapters in turn."""
    model = load_model(checkpoint, device=CPU, dtype=torch.float32, numerics="exact")
    cache = KVCache(model.spec, batch * 16 + 1, 16, dtype=torch.float32, device=CPU)
    multiple = row_multiple(model)
    names = [f"adapter {number}" for number in range(num_adapters)] or [""]
    made = {name: random_adapter(model, rank) for name in names if name}
    adapters = AdapterSet(model, made, multiple) if made else None
    runner = ModelRunner(model, cache, block_size=16, row_multiple=multiple, adapters=adapters)
    limits = EngineLimits(
        num_blocks=batch * 16 + 1, block_size=16, max_model_len=256, max_num_seqs=batch,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    core = EngineCore(runner, limits, clock=time.monotonic)
    for number in range(batch):
        prompt = tuple(range(100 + number, 132 + number))
        core.add(
            EngineRequest(
                number, prompt, SamplingParams(temperature=0.0), StoppingParams(200),
                adapter=names[number % len(names)],
            )
        )  # fmt: skip
    for _ in range(4):
        core.step()
    return core


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    checkpoint = checkpoint_of(options.model, "float32", options.cache_dir)
    cores = [core_of(checkpoint, options.batch, n, options.rank) for n in (0, options.adapters)]
    seconds: list[list[float]] = [[] for _ in cores]
    for _ in range(options.steps):
        for core, taken in zip(cores, seconds, strict=True):
            begin = time.perf_counter()
            core.step()
            taken.append(time.perf_counter() - begin)
    base, adapted = (statistics.median(taken) for taken in seconds)
    print(
        f"step of {options.batch}: {1e3 * base:.1f} ms of the base, {1e3 * adapted:.1f} ms under "
        f"{options.adapters} adapters of rank {options.rank}: {base / adapted:.2f} of the base's throughput"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
