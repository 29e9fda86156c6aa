"""The parts of a block: norms, linear maps, activations, positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import NormSpec, RopePositions


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), which GPT-2 calls gelu_new."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
}


class Weights(nn.Module):
    """A matrix or vector and perhaps a bias, without gradients; the loader fills them."""

    bias: nn.Parameter | None

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if bias else None


class Linear(Weights):
    """weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(Weights):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, spec: NormSpec, size: int) -> None:
        if spec.kind not in ("rms", "layer"):
            raise ValueError(f"norm {spec.kind!r} is not implemented")
        super().__init__(size, bias=spec.kind == "layer")
        self.rms = spec.kind == "rms"
        self.eps = spec.eps
        self.shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def rope_frequencies(spec: RopePositions, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.scaling == "default":
        return frequencies
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling != "llama3":
        raise ValueError(f"rope scaling {spec.scaling!r} is not implemented")
    wavelengths = 2 * math.pi / frequencies
    original, low, high = spec.original_max_position_embeddings, spec.low_freq_factor, spec.high_freq_factor
    scaled = torch.where(wavelengths > original / low, frequencies / spec.factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, scaled)


class Rotation:
    """The angles of a step's rows, computed once and applied in every layer.

    x cos + rotate_half(x) sin, where rotate_half turns the halves (a, b) into (-b, a).
    """

    def __init__(self, frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        angles = positions.to(torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.stack((cos, cos), 1)[:, None].to(dtype)  # [N, 1, 2, head_dim / 2]
        self.sin = torch.stack((-sin, sin), 1)[:, None].to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [N, heads, head_dim], a new tensor."""
        halves = x.view(*x.shape[:2], 2, -1)
        return (halves * self.cos).addcmul_(halves.flip(2), self.sin).view(x.shape)
