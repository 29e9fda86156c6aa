"""Attention by contents and distances apart (He et al. 2021, DeBERTa).

    score(q, k) = content(q) . content(k)
                + content(q) . key of the distance q - k        (content to position)
                + content(k) . query of the distance q - k      (position to content)

A distance has no content: keys and queries of all distances are made once, when the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder_spec import ConvolutionSpec, Disentangled
from .layers import Linear, Norm, Weights


class DistanceTable(nn.Module):
    """A vector for every bucket of distances, for all layers: [2 num_buckets, hidden]."""

    def __init__(self, spec: Disentangled, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * spec.num_buckets, hidden_size), requires_grad=False)
        self.norm = None if spec.norm is None else Norm(spec.norm, hidden_size)

    def forward(self) -> Tensor:
        """As the layers read it."""
        return self.weight if self.norm is None else self.norm(self.weight)


class DistanceProduct(Weights):
    """What makes keys or queries of distances; no step multiplies it."""


Product = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass(frozen=True, slots=True)
class DistanceRows:
    """Keys and queries of all distances, scaled: [heads, head_dim, 2 num_buckets] each, or none."""

    keys: Tensor | None
    queries: Tensor | None


class DistanceScores(nn.Module):
    """A layer's keys and queries of distances, and what they add to its scores.

    `others`, where adapters change them: by the first row of an input in its step, those to read.
    """

    others: Callable[[int], DistanceRows | None] | None = None
    key_rows: Tensor | None
    query_rows: Tensor | None

    def __init__(self, spec: Disentangled, hidden_size: int, num_heads: int, scale: float) -> None:
        super().__init__()
        self.spec = spec
        self.num_heads = num_heads
        self.scale = scale

        def own(wanted: bool) -> DistanceProduct | None:
            made = wanted and not spec.shared
            return DistanceProduct(hidden_size, hidden_size, bias=True) if made else None

        self.key, self.query = own(spec.content_to_position), own(spec.position_to_content)
        self.register_buffer("key_rows", None, persistent=False)  # see `DistanceRows`
        self.register_buffer("query_rows", None, persistent=False)

    def prepare(self, table: Tensor, qkv: Weights) -> None:
        """Makes keys and queries of the distances' vectors [2 num_buckets, hidden]."""

        def product(module: Weights) -> Product:
            return module.weight, module.bias

        own = tuple(None if module is None else product(module) for module in (self.key, self.query))
        made = self.rows(table, product(qkv), own[0], own[1])
        self.key_rows, self.query_rows = made.keys, made.queries

    @torch.inference_mode()
    def rows(self, table: Tensor, qkv: Product, key: Product | None, query: Product | None) -> DistanceRows:
        """Of products with these; `key` and `query` None: with those of contents."""
        width = table.shape[1]

        def made(own: Product | None, first: int) -> Tensor:
            weight, bias = qkv if own is None else own
            if own is None:
                rows = slice(first, first + width)
                weight, bias = weight[rows], None if bias is None else bias[rows]
            found = F.linear(table, weight, bias) * self.scale
            return found.view(len(table), self.num_heads, -1).permute(1, 2, 0).contiguous()

        return DistanceRows(
            made(key, width) if self.spec.content_to_position else None,
            made(query, 0) if self.spec.position_to_content else None,
        )

    def forward(self, query: Tensor, key: Tensor, distances: Distances, row: int) -> Tensor:
        """[count, heads, n, n], scaled, of [count, heads, n, head_dim] from a row of the step on."""
        length = query.shape[2]
        first, end = distances.span(length)
        index = distances.of(length).expand(*query.shape[:2], length, length)
        own = DistanceRows(self.key_rows, self.query_rows)
        read = [self._others_of(row + i * length) or own for i in range(len(query))]
        found: list[Tensor] = []
        # Input by input: a product of several may round otherwise than a product of one.
        if own.keys is not None:
            keys = [rows.keys[..., first:end] for rows in read if rows.keys is not None]
            scores = torch.stack([torch.bmm(*pair) for pair in zip(query, keys, strict=True)])
            found.append(scores.gather(3, index))  # [.., q, k] of [.., q, distance]
        if own.queries is not None:
            queries = [rows.queries[..., first:end] for rows in read if rows.queries is not None]
            scores = torch.stack([torch.bmm(*pair) for pair in zip(key, queries, strict=True)])
            found.append(scores.gather(3, index.transpose(2, 3)).transpose(2, 3))
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _others_of(self, row: int) -> DistanceRows | None:
        return None if self.others is None else self.others(row)


class Distances:
    """The buckets of the distances within an input, by its length; for all layers of a step."""

    def __init__(self, spec: Disentangled, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._found: dict[int, tuple[int, int, Tensor]] = {}

    def span(self, length: int) -> tuple[int, int]:
        """The first row of the table that an input so long reads, and the end of them."""
        return self._make(length)[:2]

    def of(self, length: int) -> Tensor:
        """int64 [n, n]: of a query (row) and a key, the row of the table, counted from the span's first."""
        return self._make(length)[2]

    def _make(self, length: int) -> tuple[int, int, Tensor]:
        if length not in self._found:
            rows = distance_rows(torch.arange(1 - length, length), self._spec)
            first, end = int(rows[0]), int(rows[-1]) + 1
            places = torch.arange(length)
            index = rows[places[:, None] - places[None] + length - 1] - first
            self._found[length] = (first, end, index.to(self._device))
        return self._found[length]


def distance_rows(distance: Tensor, spec: Disentangled) -> Tensor:
    """The row of the table of each distance int64 [...] (the query's position minus the key's).

    Up to half of the buckets a distance has its own, beyond that they are shared by logarithm.
    """
    if spec.max_distance:
        middle = spec.num_buckets // 2
        far = distance.abs().clamp(min=middle)
        # In float32, in the reference's order: it decides at the borders of buckets.
        steps = torch.log(far / middle) / torch.log(torch.tensor((spec.max_distance - 1) / middle))
        shared = (torch.ceil(steps * (middle - 1)) + middle) * distance.sign()
        distance = torch.where(distance.abs() <= middle, distance, shared.long())
    return (distance + spec.num_buckets).clamp(0, 2 * spec.num_buckets - 1)


class Convolution(nn.Module):
    """What the first layer's output gets of the embeddings around each token (DeBERTa-v2)."""

    def __init__(self, spec: ConvolutionSpec, hidden_size: int) -> None:
        super().__init__()
        self.size = spec.kernel_size
        self.taps = Linear(hidden_size, spec.kernel_size * hidden_size, bias=True)

    def forward(self, x: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
        """[N, hidden] of rows [N, hidden]; beyond an input's ends there are zeros."""
        reach = self.size // 2
        around = x.new_zeros((x.shape[0], self.size, x.shape[1]))
        for row, count, length in runs:
            rows = slice(row, row + count * length)
            inputs = F.pad(x[rows].view(count, length, -1), (0, 0, reach, reach))
            windows = inputs.unfold(1, self.size, 1).transpose(2, 3)  # [count, length, size, hidden]
            around[rows] = windows.reshape(count * length, self.size, -1)
        return self.taps(around.flatten(1))
