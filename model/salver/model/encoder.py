"""One stack for every encoder: a flat, padding-free batch in, hidden states of every token out.

    rows       [N, hidden]   the inputs' tokens one after the other, equal lengths side by side
    attention  for each run of inputs of one length n: [count, heads, n, head_dim]

No input sees another, and inputs of equal length are computed by one call whose parts do not know one
another, so that a batch changes nothing but speed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .arithmetic import LoadedTensor
from .buckets import distance_buckets
from .disentangled import Convolution, Distances, DistanceScores, DistanceTable
from .encoder_spec import EncoderSpec, HeadSpec, RelativeBuckets
from .layers import ACTIVATIONS, Embedding, Linear, Norm, Weights
from .rope import Rope, Rotation, sinusoids

ENCODER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "tanh": torch.tanh}
MASKED = -math.inf
SCORES_AT_ONCE = 1 << 22  # where scores have terms of their own for every input: 16 MiB of them


@dataclass(slots=True)
class EncoderBatch:
    """Whole inputs, one after the other; N flat rows, the last ones padding."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N], rows of the position table (or just positions, for rotation)
    segments: Tensor  # int64 [N]
    cu_seqlens: list[int]  # where each input begins, and the end of the last

    def runs(self) -> list[tuple[int, int, int]]:
        """(first row, inputs, length) of each run of inputs of one length."""
        lengths = [end - start for start, end in itertools.pairwise(self.cu_seqlens)]
        found: list[tuple[int, int, int]] = []
        row = 0
        for length, group in itertools.groupby(lengths):
            count = len(list(group))
            found.append((row, count, length))
            row += count * length
        return found


def build_encoder_batch(
    spec: EncoderSpec,
    inputs: Sequence[Sequence[int]],
    segments: Sequence[Sequence[int]],
    *,
    row_multiple: int,
    device: torch.device,
) -> EncoderBatch:
    """Lays the inputs one after the other; `segments` are empty where all are 0.

    Equal lengths should stand side by side. The number of rows is padded to `row_multiple`.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    segment_ids: list[int] = []
    bounds = [0]
    table = spec.positions
    for ids, kinds in zip(inputs, segments, strict=True):
        token_ids += ids
        segment_ids += kinds or [0] * len(ids)
        first = 0 if table is None else table.offset
        if table is not None and table.padding_id is not None and table.padding_id in ids:
            counted = itertools.accumulate(int(token != table.padding_id) for token in ids)
            positions += [
                first - 1 + (count if token != table.padding_id else 0)
                for token, count in zip(ids, counted, strict=True)
            ]
        else:
            positions += range(first, first + len(ids))
        bounds.append(len(token_ids))
    padding = [0] * (-len(token_ids) % row_multiple)
    flat = torch.tensor([token_ids + padding, positions + padding, segment_ids + padding], device=device)
    return EncoderBatch(flat[0], flat[1], flat[2], bounds)


class SelfAttention:
    """Softmax attention of every token to every other of its input, with a bias and a window if need be."""

    def __init__(self, spec: EncoderSpec, distance_scores: DistanceScores | None) -> None:
        self.num_heads = spec.num_heads
        self.head_dim = spec.head_dim
        self.scale = spec.attention_scale
        self._distance_scores = distance_scores

    def __call__(self, qkv: Tensor, runs: list[tuple[int, int, int]], masks: Masks) -> Tensor:
        """[N, heads x head_dim] of queries, keys, values [N, 3, heads, head_dim]; padding rows are 0."""
        out = qkv.new_zeros((qkv.shape[0], self.num_heads, self.head_dim))
        for row, count, length in self._parts(runs):
            rows = slice(row, row + count * length)
            parts = qkv[rows].view(count, length, 3, self.num_heads, self.head_dim)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            mask = self._added(query, key, masks, row)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
            out[rows] = found.transpose(1, 2).reshape(count * length, self.num_heads, self.head_dim)
        return out.flatten(1)

    def _parts(self, runs: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        """The runs, cut where every input's scores take memory of their own."""
        for row, count, length in runs:
            most = count
            if self._distance_scores is not None:
                most = max(1, SCORES_AT_ONCE // (self.num_heads * length * length))
            for first in range(0, count, most):
                yield row + first * length, min(most, count - first), length

    def _added(self, query: Tensor, key: Tensor, masks: Masks, row: int) -> Tensor | None:
        """To the scores of [count, heads, n, head_dim] from a row on: [count or 1, heads or 1, n, n]."""
        mask = masks.of(query.shape[2])
        if self._distance_scores is None or masks.distances is None:
            return mask
        added: Tensor = self._distance_scores(query, key, masks.distances, row)
        return added if mask is None else added + mask

    def weights(self, heads: Tensor, wanted: list[int], masks: Masks, row: int = 0) -> Tensor:
        """float32 [wanted, n, n] of an input's queries and keys [n, 3, heads, head_dim]; rows sum to 1.

        `wanted`: of which heads. `row`: the input's first one in its step.
        """
        query, key = (part[None].transpose(1, 2) for part in (heads[:, 0], heads[:, 1]))
        added = self._added(query, key, masks, row)
        scores = torch.einsum("hnd,hld->hnl", query[0, wanted].float(), key[0, wanted].float()) * self.scale
        if added is not None:
            added = added.expand(1, self.num_heads, -1, -1)[0, wanted].float()
        return (scores if added is None else scores + added).softmax(-1)


class Masks:
    """What is added to the scores of a layer, by length: [heads or 1, n, n], or nothing.

    `distances`: of an encoder whose scores also have terms of distances.
    """

    def __init__(
        self,
        bias: Callable[[int], Tensor] | None,
        window: int,
        like: Tensor,
        distances: Distances | None = None,
    ) -> None:
        self.distances = distances
        self._bias = bias
        self._window = window
        self._like = like
        self._found: dict[int, Tensor | None] = {}

    def of(self, length: int) -> Tensor | None:
        if length not in self._found:
            self._found[length] = self._make(length)
        return self._found[length]

    def _make(self, length: int) -> Tensor | None:
        mask = None if self._bias is None else self._bias(length)
        if self._window and length > self._window + 1:
            places = torch.arange(length, device=self._like.device)
            outside = (places[:, None] - places[None]).abs() > self._window
            hidden = torch.zeros((1, length, length), dtype=self._like.dtype, device=self._like.device)
            hidden.masked_fill_(outside, MASKED)
            mask = hidden if mask is None else mask + hidden
        return mask


# Is told a layer's place, its attention, heads [N, 3, heads, head_dim] and masks.
OnHeads = Callable[[int, SelfAttention, Tensor, Masks], None]


class EncoderLayer(nn.Module):
    """Attention and MLP with their norms behind or before them."""

    def __init__(self, spec: EncoderSpec, *, attention_norm: bool = True) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.num_heads, self.head_dim = spec.num_heads, spec.head_dim
        width = spec.num_heads * spec.head_dim
        self.pre_norm = spec.pre_norm
        self.gated = spec.gated
        self.activation = ENCODER_ACTIVATIONS[spec.activation]
        self.distance: DistanceScores | None = None
        if spec.disentangled is not None:
            self.distance = DistanceScores(spec.disentangled, hidden, spec.num_heads, spec.attention_scale)
        self.attention = SelfAttention(spec, self.distance)
        self.qkv = Linear(3 * width, hidden, bias=spec.qkv_bias)
        self.attention_out = Linear(hidden, width, bias=spec.attention_out_bias)
        self.attention_norm = Norm(spec.norm, hidden) if attention_norm else None
        self.up = Linear(2 * inner if spec.gated else inner, hidden, bias=spec.mlp_bias)  # gate, up
        self.down = Linear(hidden, inner, bias=spec.mlp_bias)
        self.mlp_norm = Norm(spec.norm, hidden)
        own = spec.buckets is not None and spec.buckets.own
        self.buckets = Weights(spec.buckets.num_buckets, spec.num_heads) if own and spec.buckets else None

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        runs: list[tuple[int, int, int]],
        masks: Masks,
        observe: Callable[[SelfAttention, Tensor, Masks], None] | None = None,
    ) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        normed = x if not self.pre_norm or self.attention_norm is None else self.attention_norm(x)
        heads = self.qkv(normed).view(x.shape[0], 3, self.num_heads, self.head_dim)
        if rotation is not None:
            turned = rotation(heads[:, :2].reshape(x.shape[0], 2 * self.num_heads, self.head_dim))
            heads = torch.cat((turned.view(x.shape[0], 2, self.num_heads, self.head_dim), heads[:, 2:]), 1)
        if observe is not None:
            observe(self.attention, heads, masks)
        x = x + self.attention_out(self.attention(heads, runs, masks))
        if not self.pre_norm and self.attention_norm is not None:
            x = self.attention_norm(x)
        inner = self.up(self.mlp_norm(x) if self.pre_norm else x)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            # Of one row the half is contiguous, of more it is not, and GELU rounds the two differently.
            inner = self.activation(gate.contiguous()) * up
        else:
            inner = self.activation(inner)
        x = x + self.down(inner)
        return x if self.pre_norm else self.mlp_norm(x)


class Head(nn.Module):
    """What a `HeadSpec` says: dense, activation, norm, out."""

    def __init__(self, spec: HeadSpec, hidden_size: int) -> None:
        super().__init__()
        width = spec.dense_size or hidden_size
        self.dense = Linear(width, hidden_size, bias=spec.dense_bias) if spec.dense_size else None
        self.activation = ENCODER_ACTIVATIONS[spec.activation]
        self.norm = Norm(spec.norm, width) if spec.norm is not None else None
        self.out = None if spec.tied else Linear(spec.size, width, bias=spec.out_bias)
        self.bias = Weights(spec.size) if spec.tied and spec.out_bias else None
        self.tied_product: Callable[[Tensor], Tensor] | None = None  # of another kernel

    def forward(self, x: Tensor, tied: Tensor) -> Tensor:
        """[R, size] of [R, hidden]; `tied` is the matrix of a tied output."""
        if self.dense is not None:
            x = self.activation(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        if self.out is not None:
            out: Tensor = self.out(x)
            return out
        if self.tied_product is not None:
            return self.tied_product(x)
        return F.linear(x, tied, None if self.bias is None else self.bias.weight)


class Encoder(nn.Module):
    """An encoder built from its spec. Parameters are uninitialized until `load_encoder` fills them."""

    loaded: tuple[LoadedTensor, ...] = ()  # what the parameters were made of
    checkpoint: Path | None = None  # and the directory that they came from
    adapter_hooks: tuple[RemovableHandle, ...] = ()

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.embedding_size or spec.hidden_size
        self.embed = Embedding(spec.vocab_size, size)
        table = spec.positions
        rows = 0 if table is None or spec.sinusoids else spec.max_input_tokens + table.offset
        self.positions = Embedding(rows, size) if rows else None
        self.segments = Embedding(spec.num_segments, size) if spec.num_segments else None
        normed = spec.hidden_size if spec.projection_first else size
        self.embedding_norm = Norm(spec.norm, normed) if spec.embedding_norm else None
        self.embedding_projection = (
            Linear(spec.hidden_size, size, bias=not spec.projection_first)
            if spec.embedding_projection
            else None
        )
        shared = spec.buckets is not None and not spec.buckets.own
        self.buckets = Weights(spec.buckets.num_buckets, spec.num_heads) if shared and spec.buckets else None
        self.distances = (
            DistanceTable(spec.disentangled, spec.hidden_size) if spec.disentangled is not None else None
        )
        self.convolution: Convolution | None = None
        self.convolution_norm: Norm | None = None
        if spec.convolution is not None:
            self.convolution = Convolution(spec.convolution, spec.hidden_size)
            self.convolution_norm = Norm(spec.norm, spec.hidden_size)
        self.layers = nn.ModuleList(
            EncoderLayer(spec, attention_norm=spec.first_norm or index > 0)
            for index in range(spec.num_layers)
        )
        self.final_norm = Norm(spec.norm, spec.hidden_size) if spec.final_norm else None
        self.head = Head(spec.head, spec.hidden_size) if spec.head else None
        self.rope: Rope | None = None
        self.local_rope: Rope | None = None
        self._waves: Tensor | None = None
        self.look_up: Callable[[Tensor], Tensor] | None = None  # of embeddings that another kernel holds

    def place(self, device: torch.device) -> None:
        """Computes what is derived from the spec, on the device. The loader calls it."""
        spec = self.spec
        if spec.rope is not None:
            self.rope = Rope(spec.rope, spec.head_dim, device)
            local = spec.local_rope or spec.rope
            self.local_rope = Rope(local, spec.head_dim, device)
        if spec.sinusoids is not None:
            rows = spec.max_input_tokens + (0 if spec.positions is None else spec.positions.offset)
            self._waves = sinusoids(spec.sinusoids, rows, spec.hidden_size).to(device)

    def prepare(self) -> None:
        """Computes what is derived from the weights. Whoever changes them calls it again."""
        if self.distances is None:
            return
        table = self.distances()
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer) and layer.distance is not None
            layer.distance.prepare(table, layer.qkv)

    def forward(
        self,
        batch: EncoderBatch,
        on_layer: Callable[[], None] | None = None,
        on_heads: OnHeads | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden_size] after the last layer. `on_layer` is called after each layer.

        `on_heads` is told each layer's place, its attention, heads [N, 3, heads, head_dim] and masks.
        """
        spec = self.spec
        x = embedded = self._embed(batch)
        rotation = local = None
        if self.rope is not None and self.local_rope is not None:
            rotation = self.rope.rotation(batch.positions, None, x.dtype)
            local = self.local_rope.rotation(batch.positions, None, x.dtype) if spec.windows else rotation
        masks = self.masks(x)
        runs = batch.runs()
        for step, index in enumerate(spec.order):
            window = spec.window(step)
            observe = None if on_heads is None else functools.partial(on_heads, step)
            own, seen = self.layers[index].buckets, masks[window]
            if isinstance(own, Weights):
                seen = Masks(functools.partial(self._bucket_bias, own), window, x)
            x = self.layers[index](x, local if window else rotation, runs, seen, observe)
            if step == 0 and self.convolution is not None:
                x = self._convolved(x, embedded, runs)
            if on_layer is not None:
                on_layer()
        hidden: Tensor = x if self.final_norm is None else self.final_norm(x)
        return hidden

    def masks(self, like: Tensor) -> dict[int, Masks]:
        """Of each window that layers have (0: none), in the kind of `like`."""
        bias = None if self.buckets is None else functools.partial(self._bucket_bias, self.buckets)
        apart = self.spec.disentangled
        distances = None if apart is None else Distances(apart, like.device)
        return {
            window: Masks(bias, window, like, distances)
            for window in {self.spec.window(step) for step in range(len(self.spec.order))}
        }

    def _embed(self, batch: EncoderBatch) -> Tensor:
        """[N, hidden_size]"""
        spec, ids = self.spec, batch.token_ids
        x = self.embed(ids) if self.look_up is None else self.look_up(ids)
        if spec.embedding_multiplier != 1:
            x = x * torch.tensor(spec.embedding_multiplier, dtype=x.dtype, device=x.device)
        # In the order in which the reference adds them, which is seen in the last bits.
        if self.segments is not None:
            x = x + self.segments(batch.segments)
        if self.positions is not None:
            x = x + self.positions(batch.positions)
        if self._waves is not None:
            x = x + F.embedding(batch.positions, self._waves).to(x.dtype)
        if self.embedding_projection is not None and spec.projection_first:
            x = self.embedding_projection(x)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.embedding_projection is not None and not spec.projection_first:
            x = self.embedding_projection(x)
        return x

    def _convolved(self, x: Tensor, embedded: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
        assert self.convolution is not None and self.convolution_norm is not None
        assert self.spec.convolution is not None
        activation = ENCODER_ACTIVATIONS[self.spec.convolution.activation]
        return self.convolution_norm(x + activation(self.convolution(embedded, runs)))

    def scores(self, rows: Tensor) -> Tensor:
        """float32 [R, head.size] of hidden rows [R, hidden_size], by the head."""
        if self.head is None:
            raise ValueError(f"{self.spec.architecture} has no head")
        found: Tensor = self.head(rows, self.embed.weight)
        return found.float()

    def _bucket_bias(self, table: Weights, length: int) -> Tensor:
        """[heads, n, n]"""
        assert self.spec.buckets is not None
        places = torch.arange(length, device=self.device)
        found = relative_buckets(places[None] - places[:, None], self.spec.buckets)
        rows: Tensor = F.embedding(found, table.weight)
        return rows.permute(2, 0, 1)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights, packed ones too."""
        return [*self.parameters(), *self.buffers()]


def relative_buckets(distance: Tensor, spec: RelativeBuckets) -> Tensor:
    """The bucket of each key's distance from its query: half for either side, far ones by logarithm.

    (Raffel et al. 2020, bidirectional.)
    """
    half = spec.num_buckets // 2
    return (distance > 0).long() * half + distance_buckets(distance.abs(), half, spec.max_distance)
