"""The parts that families differ in: norms, activations, rotary tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salver.model.spec import ModelSpec, RopeSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


class Linear(nn.Module):
    """A product with optional bias, weight [out, in], without the initialization of nn.Linear."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), by the spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.weight = nn.Parameter(torch.empty(spec.hidden_size), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(spec.hidden_size), requires_grad=False) if spec.norm == "layer" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """A table [rows, hidden_size]."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


def rope_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position for each of the head_dim / 2 pairs, float32, scaling applied."""
    frequencies = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        # Meta's published formula: long wavelengths are stretched, short ones kept, between them a blend.
        wavelengths = 2 * math.pi / frequencies
        low = spec.original_max_position_embeddings / spec.low_freq_factor
        high = spec.original_max_position_embeddings / spec.high_freq_factor
        smooth = (spec.original_max_position_embeddings / wavelengths - spec.low_freq_factor) / (
            spec.high_freq_factor - spec.low_freq_factor
        )
        blend = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
        scaled = torch.where(wavelengths > low, frequencies / spec.factor, frequencies)
        return torch.where((wavelengths <= low) & (wavelengths >= high), blend, scaled)
    return frequencies


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, head_dim / 2] for positions [N]; computed in float32."""
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [N, heads, head_dim], first half against second half, by cos and sin [N, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
