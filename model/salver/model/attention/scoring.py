"""How a layer makes weights of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers import capped


@dataclass(frozen=True)
class Alibi:
    """What is added to the scores: slope x key position, `multiplier` times.

    `slopes`: float32 [num_heads]. `rounded`: slopes, positions and product in bfloat16 (Falcon).
    """

    slopes: Tensor
    multiplier: float = 1.0
    rounded: bool = False

    def bias(self, positions: Tensor) -> Tensor:
        """float32 [..., num_heads, K] of keys at `positions` [..., K]."""
        dtype = torch.bfloat16 if self.rounded else torch.float32
        bias = positions[..., None, :].to(dtype) * self.slopes.to(dtype)[:, None]
        return bias.float() * self.multiplier


@dataclass(frozen=True)
class Scoring:
    """From a query and the keys that it sees to weights that sum to one, or to less with sinks.

    Attributes:
        scale: what the product of query and key is multiplied by.
        window: a query sees so many last positions, itself included; None: all before it.
        cap: then the score is cap tanh(score / cap); 0 for none.
        alibi: then this is added.
        distances: or this, float32 [num_heads, distance]: the last column stands for all beyond it too.
        sinks: [num_heads]; a further score of each head, with its part in the softmax and no value.
    """

    scale: float
    window: int | None = None
    cap: float = 0.0
    alibi: Alibi | None = None
    sinks: Tensor | None = None
    distances: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a scaled product and a mask are all."""
        return not self.cap and self.alibi is None and self.sinks is None and self.distances is None

    def distance_bias(self, keys: Tensor, queries: Tensor) -> Tensor:
        """float32 [num_heads, ..., Q, K], of keys at positions [..., K] and queries at [..., Q]."""
        assert self.distances is not None
        distance = (queries[..., :, None] - keys[..., None, :]).clamp(0, self.distances.shape[1] - 1)
        return self.distances[:, distance]

    def of_heads(self, heads: Sequence[int]) -> Scoring:
        """For these heads alone."""
        chosen = list(heads)
        alibi = None if self.alibi is None else replace(self.alibi, slopes=self.alibi.slopes[chosen])
        sinks = None if self.sinks is None else self.sinks[chosen]
        distances = None if self.distances is None else self.distances[chosen]
        return replace(self, alibi=alibi, sinks=sinks, distances=distances)

    def adjust(self, scores: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
        """Cap and bias, in place; before the mask.

        scores [..., kv_heads, group, Q, K] of keys at `positions` [..., K] for `queries` at [..., Q].
        """
        if self.cap:
            capped(scores, self.cap)
        if self.alibi is not None:
            scores += torch.unflatten(self.alibi.bias(positions), -2, scores.shape[-4:-2])[..., None, :]
        if self.distances is not None:
            bias = self.distance_bias(positions, queries).movedim(0, -3)
            scores += torch.unflatten(bias, -3, scores.shape[-4:-2])
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        """The softmax of masked scores [..., kv_heads, group, Q, K]."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores.dtype).view(*scores.shape[-4:-2], 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        scores = (scores - top).exp_()
        return scores / (scores.sum(-1, keepdim=True) + (sinks - top).exp())
