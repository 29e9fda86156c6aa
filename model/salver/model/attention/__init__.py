"""Attention through the paged cache: one interface, several implementations."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .batch import AttentionBatch, SourceBatch, into_slots, over_sources
from .scoring import Alibi, Scoring

if TYPE_CHECKING:
    from ..cache import KVCache

__all__ = [
    "Alibi", "Attention", "AttentionBatch", "Scoring", "SourceBatch", "choose", "into_slots", "over_sources",
]  # fmt: skip


class Attention(Protocol):
    """Causal attention of the rows of a step over the keys and values of their sequences.

    reads_stale: it multiplies what is masked, so that a block must be cleared before it is filled.
    """

    reads_stale: bool

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        """[N, num_heads * head_dim] from query [N, num_heads, head_dim]; keys and values are in the cache.

        Query head h reads key head h // (num_heads // num_kv_heads). Rows of padding give zeros.
        """
        ...


def choose(device: torch.device, numerics: str, dtype: torch.dtype, *, sources: bool = False) -> Attention:
    """The implementation for a device and a numerics mode ("exact" or "fast").

    The gathering one is made for the CPU and right on any device that torch knows: also on a GPU without
    Triton, and for rows that attend to `sources` or by distance, which the kernels there don't know.
    """
    from .cpu import GatheringAttention

    if numerics not in ("exact", "fast"):
        raise ValueError(f"numerics must be exact or fast, not {numerics!r}")
    if device.type == "cuda" and not sources and importlib.util.find_spec("triton") is not None:
        from .cuda import CudaAttention

        return CudaAttention(exact=numerics == "exact")
    return GatheringAttention(exact=numerics == "exact")
