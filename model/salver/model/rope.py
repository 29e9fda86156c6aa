"""Computed positions: rotary ones under every scaling, and sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import RopePositions, SinusoidalPositions


def rope_frequencies(spec: RopePositions, head_dim: int) -> Tensor:
    """float32 [rotary_dim / 2]: radians per position, in sequences up to the original context."""
    dim = spec.rotary_dim or head_dim
    frequencies = 1.0 / (spec.theta ** _exponents(dim))
    if spec.scaling in ("default", "dynamic"):
        return frequencies
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        return _llama3(spec, frequencies)
    if spec.scaling == "yarn":
        return _yarn(spec, frequencies, dim)
    if spec.scaling == "longrope":
        return _divided(spec, dim, spec.short_factors)
    raise ValueError(f"rope scaling {spec.scaling!r} is not implemented")


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim


def _divided(spec: RopePositions, dim: int, factors: tuple[float, ...]) -> Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * spec.theta ** _exponents(dim))


def _llama3(spec: RopePositions, frequencies: Tensor) -> Tensor:
    """Llama 3.1's reference code."""
    wavelengths = 2 * math.pi / frequencies
    original, low, high = spec.original_max_position_embeddings, spec.low_freq_factor, spec.high_freq_factor
    scaled = torch.where(wavelengths > original / low, frequencies / spec.factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, scaled)


def _yarn(spec: RopePositions, frequencies: Tensor, dim: int) -> Tensor:
    """Peng et al. 2023: fast dimensions as they were, slow ones divided by the factor, a ramp between."""

    def dimension(rotations: float) -> float:
        """The dimension that turns so often within the original context."""
        turns = spec.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / spec.factor * (1 - kept) + frequencies * kept


class Rope:
    """One way of rotating, on its device."""

    def __init__(self, spec: RopePositions, head_dim: int, device: torch.device) -> None:
        self.spec = spec
        self.dim = spec.rotary_dim or head_dim
        self.frequencies = rope_frequencies(spec, head_dim).to(device)
        self._exponents = _exponents(self.dim).to(device)
        long = spec.scaling == "longrope"
        self._long = _divided(spec, self.dim, spec.long_factors).to(device) if long else None

    def rotation(self, positions: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Rotation:
        """Of rows at `positions` [N]; for a rope that grows, in sequences of these `lengths` [N]."""
        frequencies = self.frequencies
        if self.spec.grows and lengths is not None:
            frequencies = self._grown(lengths)
        angles = positions.to(torch.float32)[:, None] * frequencies
        return Rotation(angles, self.spec.attention_factor, dtype)

    def _grown(self, lengths: Tensor) -> Tensor:
        """[N, rotary_dim / 2]"""
        original = self.spec.original_max_position_embeddings
        if self._long is not None:
            return torch.where(lengths[:, None] > original, self._long, self.frequencies)
        factor, dim = self.spec.factor, self.dim
        growth = factor * lengths.clamp(min=original).to(torch.float32) / original - (factor - 1)
        theta = self.spec.theta * growth ** (dim / (dim - 2))
        return 1.0 / theta[:, None] ** self._exponents


class Rotation:
    """The angles of a step's rows, computed once and applied in every layer.

    x cos + rotate_half(x) sin, where rotate_half turns the halves (a, b) into (-b, a).
    """

    def __init__(self, angles: Tensor, factor: float, dtype: torch.dtype) -> None:
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.dim = 2 * angles.shape[1]
        self.cos = torch.stack((cos, cos), 1)[:, None].to(dtype)  # [N, 1, 2, rotary_dim / 2]
        self.sin = torch.stack((-sin, sin), 1)[:, None].to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [N, heads, head_dim], a new tensor; what is beyond the rotary dimensions stays."""
        turning = x if self.dim == x.shape[2] else x[..., : self.dim]
        halves = torch.unflatten(turning, 2, (2, -1))
        turned = (halves * self.cos).addcmul_(halves.flip(2), self.sin).flatten(2)
        return turned if turning is x else torch.cat((turned, x[..., self.dim :]), dim=2)


def sinusoids(spec: SinusoidalPositions, length: int, size: int) -> Tensor:
    """float32 [length, size]: the embeddings of positions, sines before cosines."""
    half = size // 2
    dtype, last = (torch.float64, half) if spec.open_end else (torch.float32, half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=dtype) * -(math.log(10000) / last))
    rows = torch.arange(spec.offset, spec.offset + length, dtype=dtype)
    angles = rows[:, None] * frequencies
    table = torch.zeros(length, size)
    table[:, : 2 * half] = torch.cat((angles.sin(), angles.cos()), dim=1)
    if spec.zero is not None and spec.offset <= spec.zero < spec.offset + length:
        table[spec.zero - spec.offset] = 0
    return table
