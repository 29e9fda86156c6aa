"""Attention through the paged cache: one interface, several implementations.

`reference` is plain torch, slow and the oracle of the others; `cpu` is plain torch laid out for speed.
"""

from __future__ import annotations

import torch

from salver.model.attention.cpu import BatchedAttention
from salver.model.attention.interface import Attention, AttentionBatch
from salver.model.attention.reference import ReferenceAttention

__all__ = ["Attention", "AttentionBatch", "BatchedAttention", "ReferenceAttention", "choose"]


def choose(dtype: torch.dtype, numerics: str) -> Attention:
    """The implementation for a dtype and a numerics mode ("exact" or "fast").

    In float32 `exact` accumulates in float64: whatever the order of a sum (batch, chunk, padding),
    its rounding to float32 comes out the same.
    """
    exact = numerics == "exact" and dtype == torch.float32
    return BatchedAttention(compute_dtype=torch.float64 if exact else dtype)
