"""Weights in 8 bits on a GPU: int8 or fp8 (e4m3), one scale for each output column.

What they multiply is rounded to 8 bits with one scale for each token, so that tokens don't know one another.
int8 products are sums of whole numbers and thus exact; fp8 ones are accumulated in float32 by
`torch._scaled_mm`. Embeddings, head, experts' and latent attention's matrices that are not plain products
stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError
from .layers import Linear
from .transformer import Transformer

KINDS = ("int8", "fp8")
FP8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": 448.0}  # that 8 bits hold
# cuBLAS multiplies int8 matrices of more than 16 rows, and widths that are multiples of these.
INT8_ROWS = 32
WIDTHS = {"int8": 8, "fp8": 16}


def quantize(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(8-bit values, float32 scales [R, 1]) of the rows of x [R, K]; values times scale are about x."""
    wide = x.float()
    # A row of zeros has no scale of its own; any will do.
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    scaled = wide / scale
    if kind == "int8":
        return scaled.round_().clamp_(-127, 127).to(torch.int8), scale
    return scaled.clamp_(-448, 448).to(FP8), scale


class QuantizedLinear(nn.Module):
    """y = x weight^T + bias, as `Linear`, with both in 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        """weight [out, in]. Raises ValueError for widths that the product does not know."""
        super().__init__()
        if any(size % WIDTHS[kind] for size in weight.shape):
            raise ValueError(f"{list(weight.shape)} are not multiples of {WIDTHS[kind]}")
        self.kind = kind
        values, scale = quantize(weight, kind)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # [1, out]
        self.register_buffer("bias", bias, persistent=False)
        self.values: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantize(x, self.kind)
        out = self._int8(values, scale) if self.kind == "int8" else self._fp8(values, scale, x.dtype)
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def _int8(self, values: Tensor, scale: Tensor) -> Tensor:
        count = values.shape[0]
        values = F.pad(values, (0, 0, 0, max(0, INT8_ROWS - count)))
        return torch._int_mm(values, self.values.t())[:count].float() * scale * self.scale

    def _fp8(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if values.device.type != "cuda":  # the same numbers; no processor multiplies them
            return F.linear(values.float(), self.values.float()) * scale * self.scale
        found: Tensor = torch._scaled_mm(
            values, self.values.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16
        )
        return found


def _products(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """The linear maps of the layers, but for those whose matrix is used otherwise too."""
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear) and not name.endswith(("latent.up", "router", "shared_gate")):
            yield name, module


def quantize_model(model: Transformer, kind: str) -> None:
    """Replaces the layers' linear maps, one after the other. Raises CheckpointError where it cannot."""
    for name, linear in list(_products(model)):
        try:
            quantized = QuantizedLinear(linear.weight, linear.bias, kind)
        except ValueError as error:
            raise CheckpointError(f"--quantization {kind}: {name}: {error}") from error
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, quantized)
