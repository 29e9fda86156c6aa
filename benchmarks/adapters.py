"""What LoRA adapters cost a full batch: the base alone, beside the same batch under several adapters.

    python -m benchmarks.adapters [--model smollm2] [--batch 32] [--adapters 8] [--rank 8] [--kernels native]

Random adapters of every linear layer, as a server computes them with the native kernel or in plain torch
(--kernels torch); steps in turns.
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
from salver.model.adapters import Adapter, AdapterBase, AdapterSet, LowRank
from salver.model.cache import KVCache
from salver.model.layers import Linear
from salver.model.loader import load_model
from salver.model.numerics import row_multiple
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
from salver.server.engine.runner import ModelRunner

CPU = torch.device("cpu")


def random_adapter(base: AdapterBase, rank: int) -> Adapter:
    """Of every linear layer but the head: so many ranks for each of the checkpoint's matrices."""
    low_rank = {}
    for name, kind in base.kinds.items():
        if kind is Linear and name != "head":
            out, width = base.shapes[f"{name}.weight"]
            parts = {"qkv": 3, "up": 2}.get(name.rpartition(".")[2], 1)
            b = torch.zeros(out, parts * rank)
            for part, rows in enumerate(torch.arange(out).tensor_split(parts)):
                b[rows, part * rank : (part + 1) * rank] = 0.01 * torch.randn(len(rows), rank)
            low_rank[name] = LowRank(torch.randn(parts * rank, width) / width**0.5, b)
    return Adapter(low_rank, {}, "")


def torch_runner(checkpoint: Path, blocks: int) -> ModelRunner:
    model = load_model(checkpoint, device=CPU, dtype=torch.float32, numerics="exact")
    cache = KVCache(model.spec, blocks, 16, dtype=torch.float32, device=CPU)
    return ModelRunner(model, cache, block_size=16, row_multiple=row_multiple(model))


def core_of(checkpoint: Path, kernels: str, dtype: str, batch: int, count: int, rank: int) -> EngineCore:
    """An engine in which `batch` sequences decode, each under one of the adapters in turn."""
    blocks = batch * 16 + 1
    if kernels == "native":
        runner = runner_of(checkpoint, dtype, torch.get_num_threads(), blocks)
    else:
        runner = torch_runner(checkpoint, blocks)
    base = AdapterBase.of(load_model(checkpoint, device=CPU, dtype=torch.float32))
    names = [f"adapter {number}" for number in range(count)] or [""]
    made = {name: random_adapter(base, rank) for name in names if name}
    runner.adapters = AdapterSet(runner.model, made, runner.row_multiple) if made else None
    limits = EngineLimits(
        num_blocks=blocks, block_size=16, max_model_len=256, max_num_seqs=batch, max_num_batched_tokens=1024
    )
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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kernels", choices=("native", "torch"), default="native")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16", help="native")
    options = parser.parse_args()
    dtype = "float32" if options.kernels == "torch" else options.dtype
    checkpoint = checkpoint_of(options.model, "float32", options.cache_dir)
    cores = [
        core_of(checkpoint, options.kernels, dtype, options.batch, n, options.rank)
        for n in (0, options.adapters)
    ]
    seconds: list[list[float]] = [[] for _ in cores]
    for _ in range(options.steps):
        for core, taken in zip(cores, seconds, strict=True):
            begin = time.perf_counter()
            core.step()
            taken.append(time.perf_counter() - begin)
    base, adapted = (statistics.median(taken) for taken in seconds)
    print(
        f"step of {options.batch} in {dtype}, {options.kernels}: {1e3 * base:.1f} ms of the base, "
        f"{1e3 * adapted:.1f} ms under "
        f"{options.adapters} adapters of rank {options.rank}: {base / adapted:.2f} of the base's throughput"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
