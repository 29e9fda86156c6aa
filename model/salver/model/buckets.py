"""Buckets of distances, whose learned biases stand for positions (Raffel et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """int64, of distances of at least 0: a bucket each for the near half, the far ones by logarithm."""
    exact = num_buckets // 2
    # In the order in which the reference computes it: a distance on a boundary falls by its last bits.
    far = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = exact + far.long()
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))
