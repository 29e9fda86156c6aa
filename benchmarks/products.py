"""The products of a layer by the native kernel, beside what others maintain for this processor.

    python -m benchmarks.products [--rows 1 32 256] [--repeats 30]

SmolLM2-135M's shapes, the head with them, random weights; microseconds, each the median of calls in
turns. The weights of `--copies` layers are read one after the other, as in a step, so that no cache holds
them. torch's own products are `F.linear` (float32, bfloat16) and `linear_dynamic`, whose scale spans the
batch; `_int_mm` stands with a scale for each token, and torchao where `.peers/products` has it
(`pip install --no-deps --target .peers/products torchao`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salver.model.kernels import build
from salver.model.kernels.library import Library
from salver.model.kernels.linear import NativeLinear
from salver.server.catalog import default_cache_dir

SHAPES = {
    "heads": (960, 576),
    "out": (576, 576),
    "up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
PEERS = Path(__file__).resolve().parent.parent / ".peers" / "products"
Product = Callable[[Tensor], Tensor]  # of float32 rows


def native(library: Library, dtype: torch.dtype) -> Callable[[Tensor], Product]:
    return lambda weight: NativeLinear(weight.to(dtype), None, library, torch.get_num_threads())


def linear(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def linear_bf16(weight: Tensor) -> Product:
    weight = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), weight)


def linear_dynamic(weight: Tensor) -> Product:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight)
    quantized: Product = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.Linear})
    return quantized


def int_mm(weight: Tensor) -> Product:
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale[:, None]).round().to(torch.int8).t()

    def product(x: Tensor) -> Tensor:
        of_rows = x.abs().amax(1, keepdim=True) / 127
        found = torch._int_mm((x / of_rows).round().to(torch.int8), whole)
        return found.float() * of_rows * scale

    return product


def torchao(weight: Tensor) -> Product:
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    module[0].weight = nn.Parameter(weight)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


def times_of(products: dict[str, list[Product]], x: Tensor, repeats: int) -> dict[str, float]:
    """Median microseconds of a call."""
    taken: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(repeats + 2):
        for name, layers in products.items():
            product = layers[turn % len(layers)]
            begin = time.perf_counter()
            product(x)
            if turn >= 2:
                taken[name].append(1e6 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--copies", type=int, default=30)
    args = parser.parse_args()
    library = Library(build.find_or_build(default_cache_dir()))
    makers: dict[str, Callable[[Tensor], Product]] = {
        "kernel, float32": native(library, torch.float32),
        "torch, float32": linear,
        "kernel, bf16": native(library, torch.bfloat16),
        "torch, bf16": linear_bf16,
        "linear_dynamic, int8": linear_dynamic,
        "_int_mm, int8": int_mm,
    }
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
        makers["torchao, int8"] = torchao
    print("| product | rows | " + " | ".join(makers) + " |\n|---|---|" + "---|" * len(makers))
    for name, (out, width) in SHAPES.items():
        copies = 1 if name == "head" else args.copies
        weights = [torch.randn(out, width) / width**0.5 for _ in range(copies)]
        products = {maker: [make(weight) for weight in weights] for maker, make in makers.items()}
        for rows in args.rows:
            if name == "head" and rows > 64:
                continue  # a step asks for the logits of the sequences that get a token
            found = times_of(products, torch.randn(rows, width), args.repeats)
            print(
                f"| {name} {width} x {out} | {rows} | "
                + " | ".join(f"{v:.0f}" for v in found.values())
                + " |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
