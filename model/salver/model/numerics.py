"""What computes the numbers, and what that promises."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

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


@torch.inference_mode()
def row_multiple(model: Transformer) -> int:
    """Smallest number to which the rows of a step are padded so that products don't tell batches apart.

    Of 1, 2, 4, 8, 16 the first such that every linear map of the model gives a row the same bits
    in a batch of any multiple of it as in a large batch, wherever the row stands; 16 if none does.
    Measured on this machine, with a random row on weights of the model's shapes.
    """
    shapes: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
    for module in (*model.layers.modules(), model.head or model.embed):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
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


def _holds(row: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor, multiple: int) -> bool:
    for rows in _PROBED_ROWS:
        if rows % multiple == 0 and not bool(
            (F.linear(row.expand(rows, -1).contiguous(), weight, bias) == expected).all()
        ):
            return False
    return True


def promise(numerics: str, dtype: torch.dtype, native: bool) -> str:
    """What the same request and `numerics_id` promise, in a word.

    "bits": the same logits to the last bit, whoever shares the batch, however the prompt is cut into
    chunks and whatever came from the cache.
    "tokens": the same tokens, whoever shares the batch and however the prompt is cut into chunks.
    "none": products and attention may round otherwise in another batch, and in half precision
    that shows in the tokens now and then.
    """
    if native:
        return "bits"
    return "tokens" if numerics == "exact" and dtype == torch.float32 else "none"


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
) -> str:
    """The promise and a digest of all that the numbers depend on, such as tokens-3fa9c2d10b7e4a55.

    `kernel` is what the native kernel calls its numerics, or empty for plain torch.
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
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{promise(numerics, dtype, bool(kernel))}-{digest[:16]}"
