"""What computes the numbers, and what that promises."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Experts
from .layers import Linear, Weights
from .precision import default_dtype_name
from .transformer import Transformer

# Raise it with any change of the computation that can change a token.
NUMERICS_REVISION = 2
ROW_MULTIPLES = (1, 2, 4, 8, 16)
# Numbers of rows that the probe compares: the kernels' choices change among the small ones.
_PROBED_ROWS = (*range(1, 17), 20, 24, 32, 40, 48)
_LARGE_BATCH = 128


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    name = default_dtype_name(device.type)
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def row_multiple(model: Transformer) -> int:
    """`row_multiple_of` the model's linear maps."""
    products: list[nn.Module] = [module for module in model.modules() if isinstance(module, Linear)]
    for module in model.modules():
        if isinstance(module, Experts):
            products += [module.up, module.down]
    return row_multiple_of(products if model.head is not None else (*products, model.embed))


@torch.inference_mode()
def row_multiple_of(modules: Iterable[nn.Module]) -> int:
    """Smallest number to which the rows of a step are padded so that products don't tell batches apart.

    Of 1, 2, 4, 8, 16 the first such that every linear map among the modules gives a row the same bits
    in a batch of any multiple of it as in a large batch, wherever the row stands; 16 if none does.
    Measured on this machine, with a random row on weights of the model's shapes.
    """
    shapes: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
    for module in modules:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.dim() == 3:  # of experts, all of one shape
            weight, bias = weight[0], None if bias is None else bias[0]
        if isinstance(weight, Tensor) and weight.dim() == 2:
            shapes.setdefault((*weight.shape, bias is not None), (weight, bias))
    found = 0
    for weight, bias in shapes.values():
        generator = torch.Generator().manual_seed(0)
        row = torch.randn((1, weight.shape[1]), generator=generator).to(weight)
        expected = F.linear(row.expand(_LARGE_BATCH, -1).contiguous(), weight, bias)[:1]
        while found < len(ROW_MULTIPLES) - 1 and not _holds(
            row, weight, bias, expected, ROW_MULTIPLES[found]
        ):
            found += 1
    return ROW_MULTIPLES[found]


@torch.inference_mode()
def fixed_rows_hold(model: Transformer, rows: int) -> bool:
    """Whether products of exactly so many rows give a row the same bits wherever it stands among them.

    Tried on the device, with every shape of the model's linear maps and a random row among others.
    """
    shapes: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and isinstance(module, Linear | Weights):
            one, its = (weight, bias) if weight.dim() == 2 else (weight[0], None if bias is None else bias[0])
            shapes.setdefault((*one.shape, its is not None), (one, its))
    generator = torch.Generator().manual_seed(0)
    for weight, bias in shapes.values():
        others = torch.randn((rows, weight.shape[1]), generator=generator).to(weight)
        expected = F.linear(others, weight, bias)
        # Turned by steps that come to every place of a tile.
        for turn in (1, 7, rows // 2, rows // 2 + 1, rows - 1):
            if not torch.equal(F.linear(others.roll(turn, 0), weight, bias).roll(-turn, 0), expected):
                return False
    return True


def _holds(row: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor, multiple: int) -> bool:
    for rows in _PROBED_ROWS:
        if rows % multiple == 0 and not bool(
            (F.linear(row.expand(rows, -1).contiguous(), weight, bias) == expected).all()
        ):
            return False
    return True


def promise(numerics: str, dtype: torch.dtype, native: bool, fixed: bool = False) -> str:
    """What the same request and `numerics_id` promise, in a word.

    "bits": the same logits to the last bit, whoever shares the batch, however the prompt is cut into
    chunks and whatever came from the cache.
    "tokens": the same tokens, whoever shares the batch and however the prompt is cut into chunks.
    "none": products and attention may round otherwise in another batch, and in half precision
    that shows in the tokens now and then.

    `fixed`: products and attention have fixed tiles (on a GPU), and the products were tried.
    """
    if native:
        return "bits"
    return "tokens" if numerics == "exact" and (dtype == torch.float32 or fixed) else "none"


def numerics_id(
    device: torch.device,
    dtype: torch.dtype,
    *,
    weights_digest: str,
    quantization: str,
    numerics: str,
    threads: int,
    row_multiple: int,
    kernel: str,
    ranks: int = 1,
    fixed_rows: int = 0,
) -> str:
    """The promise and a digest of all that the numbers depend on, such as tokens-3fa9c2d10b7e4a55.

    `kernel` is what the native kernel calls its numerics, or empty for plain torch; `ranks` how many
    processes share the model.
    """
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    facts = (
        f"revision={NUMERICS_REVISION}",
        f"weights={weights_digest}",
        f"dtype={str(dtype).removeprefix('torch.')}",
        f"quantization={quantization}",
        f"numerics={numerics}",
        f"kernel={kernel}",
        f"device={device.type} {processor}",
        # The native kernel gives every thread whole results to compute.
        f"threads={threads if device.type == 'cpu' and not kernel else 0}",
        f"torch={torch.__version__}",
        f"row_multiple={row_multiple}",
        *([f"ranks={ranks}"] if ranks > 1 else []),
        *([f"fixed_rows={fixed_rows}"] if fixed_rows else []),
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{promise(numerics, dtype, bool(kernel), bool(fixed_rows))}-{digest[:16]}"
