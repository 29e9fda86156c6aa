"""From hidden states of tokens to one vector, as sentence-transformers' Pooling does. No torch.

A `Pool` takes hidden states in order, in chunks of any size: sums go row by row in float64, so that the
same input gives the same bits however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# In the order of several that are only switched on; a list of them has an order of its own.
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

Floats = NDArray[np.floating]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Pool:
    """What has been pooled of an input so far; a new one after every chunk."""

    modes: tuple[str, ...]
    num_tokens: int = 0
    first: Floats | None = None
    last: Floats | None = None
    largest: Floats | None = None
    sum: Floats | None = None  # float64
    weighted: Floats | None = None  # float64: token i, from 1 on, counts i times

    def add(self, hidden: NDArray[np.float32]) -> Pool:
        """With the next tokens' hidden states [n, hidden_size]; n is at least 1."""
        found: dict[str, Floats | int] = {
            "num_tokens": self.num_tokens + len(hidden),
            "last": hidden[-1].copy(),
        }
        if self.first is None:
            found["first"] = hidden[0].copy()
        if "max" in self.modes:
            largest = hidden.max(axis=0)
            found["largest"] = largest if self.largest is None else np.maximum(self.largest, largest)
        if "mean" in self.modes or "mean_sqrt_len_tokens" in self.modes:
            found["sum"] = _sum(self.sum, hidden.astype(np.float64))
        if "weightedmean" in self.modes:
            weights = np.arange(self.num_tokens + 1, self.num_tokens + len(hidden) + 1, dtype=np.float64)
            found["weighted"] = _sum(self.weighted, hidden.astype(np.float64) * weights[:, None])
        return replace(self, **found)  # type: ignore[arg-type]

    def vector(self) -> NDArray[np.float32]:
        """[modes x hidden_size] of all that was added."""
        n = self.num_tokens
        parts: list[Floats] = []
        for mode in self.modes:
            if mode == "cls":
                parts.append(_there(self.first))
            elif mode == "lasttoken":
                parts.append(_there(self.last))
            elif mode == "max":
                parts.append(_there(self.largest))
            elif mode == "weightedmean":
                parts.append(_there(self.weighted) / (n * (n + 1) / 2))
            else:
                parts.append(_there(self.sum) / (n if mode == "mean" else n**0.5))
        return np.concatenate(parts).astype(np.float32)


def _sum(before: Floats | None, rows: Floats) -> Floats:
    """Of the rows, one after the other, onto what was there: numpy adds rows of a matrix in their order."""
    rows = rows if before is None else np.concatenate((before[None], rows))
    return np.asarray(np.add.reduce(rows, axis=0))


def _there(value: Floats | None) -> Floats:
    if value is None:
        raise ValueError("nothing was pooled")
    return value


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1; a vector of zeros stays."""
    return (vector / max(float(np.linalg.norm(vector.astype(np.float64))), 1e-12)).astype(np.float32)
