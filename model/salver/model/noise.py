"""Counter-based noise: a pure function of (seed, sample index, output position). No torch, no state.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), for many keys at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint32]


def philox4x32(counter: Words, key: Words) -> Words:
    """counter uint32 [R, 4], key uint32 [R, 2] -> uint32 [R, 4]."""
    c0, c1, c2, c3 = (counter[:, i].copy() for i in range(4))
    k0, k1 = key[:, 0].copy(), key[:, 1].copy()
    with np.errstate(over="ignore"):
        for _ in range(_ROUNDS):
            first = c0.astype(np.uint64) * _MULTIPLIERS[0]
            second = c2.astype(np.uint64) * _MULTIPLIERS[1]
            c0, c1, c2, c3 = (
                (second >> _SHIFT).astype(np.uint32) ^ c1 ^ k0,
                (second & _LOW).astype(np.uint32),
                (first >> _SHIFT).astype(np.uint32) ^ c3 ^ k1,
                (first & _LOW).astype(np.uint32),
            )
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """One float64 in [0, 1) with 53 random bits for every (seed, sample index, output position)."""
    seed = np.array(seeds, dtype=np.uint64)
    zeros = np.zeros(len(seed), dtype=np.uint32)
    counter = np.stack(
        (np.array(positions, dtype=np.uint32), np.array(sample_indices, dtype=np.uint32), zeros, zeros),
        axis=1,
    )
    key = np.stack(((seed & _LOW).astype(np.uint32), (seed >> _SHIFT).astype(np.uint32)), axis=1)
    words = philox4x32(counter, key)
    high = (words[:, 0] >> np.uint32(5)).astype(np.float64)
    low = (words[:, 1] >> np.uint32(6)).astype(np.float64)
    drawn: NDArray[np.float64] = (high * 2.0**26 + low) * 2.0**-53
    return drawn
