"""Attention in plain torch by gathering: the keys and values of a sequence are copied out of their blocks.

Rows that are their sequence's only query (decoding) are computed together, in buckets of similar
length; longer chunks sequence by sequence. All indices and masks are made once per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache
from .batch import AttentionBatch
from .scoring import Scoring

BUCKET_WASTE = 0.75  # no sequence of a bucket is shorter than this share of its longest ...
BUCKET_SLACK = 64  # ... or than that less so many tokens, so that short ones are not scattered
BUCKET_TOKENS = 2048  # bounds the gathered copy, which should stay in the processor's cache: 15% of a step
EXACT_ROWS = 128  # query rows at a time where whole score matrices are made


@dataclass(frozen=True)
class _DecodeBucket:
    rows: Tensor | None  # int64 [B], which rows of the step; None: all N of them, in order
    count: int  # B
    index: Tensor  # rows of the cache to gather: keys and values, sequences, heads, blocks
    length: int  # keys of the longest
    positions: Tensor  # int64 [B, length] of the keys
    queries: Tensor  # int64 [B, 1]
    bias: Tensor | None  # float [B, 1, 1, 1, length]: -inf for what a query does not see; None: it sees all


@dataclass(frozen=True)
class _Chunk:
    begin: int
    end: int
    offset: int  # position of the first key
    length: int  # keys
    index: Tensor
    bias: Tensor | None  # [end - begin, length]: -inf for what a query does not see; None: all but the future


@dataclass(frozen=True)
class _Plan:
    buckets: list[_DecodeBucket]
    chunks: list[_Chunk]


class GatheringAttention:
    """See the module. `exact` computes float32 in float64, which makes results independent of how
    keys are padded and queries chunked, up to a last rounding; half precisions in float32.
    """

    reads_stale = True

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self._scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._planners: dict[int | None, _Planner] = {}  # by window

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        planner = self._planners.get(scoring.window)
        if planner is None or planner.cache is not cache:
            planner = self._planners[scoring.window] = _Planner(cache, scoring.window)
        plan = batch.derive(planner.plan)
        if not plan.chunks and len(plan.buckets) == 1 and plan.buckets[0].rows is None:
            return self._decode(query, cache, layer, plan.buckets[0], scoring)
        num_rows, num_heads, head_dim = query.shape
        out = query.new_empty((num_rows, num_heads * head_dim))
        out[batch.num_tokens :] = 0
        for bucket in plan.buckets:
            assert bucket.rows is not None
            found = self._decode(query.index_select(0, bucket.rows), cache, layer, bucket, scoring)
            out.index_copy_(0, bucket.rows, found)
        for chunk in plan.chunks:
            out[chunk.begin : chunk.end] = self._chunk(
                query[chunk.begin : chunk.end], cache, layer, chunk, scoring
            )
        return out

    def _buffer(self, name: str, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory that is used again by every layer: fresh megabytes cost more than the copy into them."""
        key = (name, dtype, like.device)
        found = self._scratch.get(key)
        if found is None or found.numel() < numel:
            with torch.inference_mode(False):
                found = self._scratch[key] = torch.empty(numel, dtype=dtype, device=like.device)
        return found[:numel]

    def _gather(self, cache: KVCache, layer: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        """[len(index), block_size * head_dim] of the cache, in `dtype`; valid until the next call."""
        rows = cache.block_rows(layer)
        shape = (index.numel(), rows.shape[1])
        stored = self._buffer("stored", index.numel() * rows.shape[1], rows, rows.dtype).view(shape)
        torch.index_select(rows, 0, index, out=stored)
        if dtype == rows.dtype:
            return stored
        return self._buffer("wide", stored.numel(), rows, dtype).view(shape).copy_(stored)

    def _compute_dtype(self, dtype: torch.dtype, scoring: Scoring) -> torch.dtype:
        if not self.exact:
            return dtype if scoring.plain else torch.float32
        return torch.float64 if dtype == torch.float32 else torch.float32

    def _decode(
        self, query: Tensor, cache: KVCache, layer: int, bucket: _DecodeBucket, scoring: Scoring
    ) -> Tensor:
        """[B, num_heads * head_dim] of query [B, num_heads, head_dim]; heads that share keys are a matrix."""
        heads, head_dim = cache.num_kv_heads, cache.head_dim
        group = query.shape[1] // heads
        dtype = self._compute_dtype(query.dtype, scoring)
        gathered = self._gather(cache, layer, bucket.index, dtype)
        keys, values = gathered.view(2, bucket.count * heads, -1, head_dim)[:, :, : bucket.length].unbind(0)
        rows = query.reshape(bucket.count * heads, group, head_dim).to(dtype) * scoring.scale
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(bucket.count, heads, group, 1, -1)
        scores = scoring.adjust(scores, bucket.positions, bucket.queries)
        if bucket.bias is not None:
            scores += bucket.bias
        weights = scoring.weights(scores).view(bucket.count * heads, group, -1)
        return torch.bmm(weights, values).view(bucket.count, -1).to(query.dtype)

    def _chunk(self, query: Tensor, cache: KVCache, layer: int, chunk: _Chunk, scoring: Scoring) -> Tensor:
        """[n, num_heads * head_dim] of query [n, num_heads, head_dim]."""
        heads, head_dim = cache.num_kv_heads, cache.head_dim
        wide = self.exact and query.dtype == torch.float32
        by_hand = wide or not scoring.plain
        dtype = self._compute_dtype(query.dtype, scoring) if by_hand else query.dtype
        gathered = self._gather(cache, layer, chunk.index, dtype)
        keys, values = gathered.view(2, heads, -1, head_dim)[:, :, : chunk.length].unbind(0)
        rows = query.transpose(0, 1)  # [num_heads, n, head_dim]
        if by_hand:
            found = self._tiles(rows.to(dtype) * scoring.scale, keys, values, scoring, chunk.offset)
            return found.to(query.dtype)
        found = F.scaled_dot_product_attention(  # float32 inside, whatever it is given
            rows[None],
            keys[None],
            values[None],
            attn_mask=chunk.bias,
            is_causal=chunk.bias is None,
            scale=scoring.scale,
            enable_gqa=True,
        )
        return found[0].transpose(0, 1).flatten(1)

    def _tiles(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, offset: int) -> Tensor:
        """[n, num_heads * head_dim] of query [num_heads, n, head_dim], some rows at a time.

        Heads that share keys are one matrix; keys that no row of a tile sees are not touched. The first
        key is at position `offset`.
        """
        heads, length, head_dim = keys.shape
        count = query.shape[1]
        group = query.shape[0] // heads
        past = length - count
        positions = torch.arange(length, device=query.device)
        out = query.new_empty((count, heads, group, head_dim))
        for begin in range(0, count, EXACT_ROWS):
            end = min(begin + EXACT_ROWS, count)
            first = 0 if scoring.window is None else max(0, past + begin - scoring.window + 1)
            seen = slice(first, past + end)
            rows = query[:, begin:end].reshape(heads, group * (end - begin), head_dim)
            scores = torch.bmm(rows, keys[:, seen].transpose(1, 2))
            scores = scores.view(heads, group, end - begin, past + end - first)
            queries = positions[past + begin : past + end] + offset
            scores = scoring.adjust(scores, positions[seen] + offset, queries)
            if scoring.window is None:
                corner = torch.ones((end - begin, end - begin), dtype=torch.bool, device=query.device).triu_(
                    1
                )
                scores[..., past + begin :].masked_fill_(corner, float("-inf"))
            else:
                hidden = _hidden(positions[seen], queries - offset, scoring.window)
                scores.masked_fill_(hidden, float("-inf"))
            weights = scoring.weights(scores).view(heads, group * (end - begin), -1)
            found = torch.bmm(weights, values[:, seen]).view(heads, group, end - begin, head_dim)
            out[begin:end] = found.permute(2, 0, 1, 3)
        return out.flatten(1)


def _hidden(keys: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """bool [Q, K]: which keys at positions [K] a query at positions [Q] does not see."""
    hidden = keys > queries[:, None]
    return hidden if window is None else hidden | (keys <= queries[:, None] - window)


class _Planner:
    """Makes the plan of a step for one cache and window. Blocks that no query sees are not gathered."""

    def __init__(self, cache: KVCache, window: int | None) -> None:
        self.cache = cache
        self._window = window

    def plan(self, batch: AttentionBatch) -> _Plan:
        block_size = self.cache.block_size
        bounds = batch.cu_seqlens_q
        sequences = range(len(batch.seq_lens))
        decodes = [s for s in sequences if bounds[s + 1] - bounds[s] == 1]
        chunks = [self._chunk(batch, s) for s in sequences if bounds[s + 1] - bounds[s] > 1]
        lengths = {s: batch.seq_lens[s] - self._offset(batch.seq_lens[s]) for s in decodes}
        decodes.sort(key=lambda s: -lengths[s])  # stable: equal lengths stay in order
        buckets: list[_DecodeBucket] = []
        begin = 0
        while begin < len(decodes):
            longest = lengths[decodes[begin]]
            padded = -(-longest // block_size) * block_size
            shortest = min(longest * BUCKET_WASTE, longest - BUCKET_SLACK)
            end = begin + 1
            while (
                end < len(decodes)
                and lengths[decodes[end]] >= shortest
                and (end + 1 - begin) * padded <= BUCKET_TOKENS
            ):
                end += 1
            buckets.append(self._bucket(batch, decodes[begin:end]))
            begin = end
        if len(buckets) == 1 and not chunks and batch.slot_mapping.numel() == len(decodes):
            buckets = [self._bucket(batch, sorted(decodes), everything=True)]
        return _Plan(buckets, chunks)

    def _offset(self, length: int, queries: int = 1) -> int:
        """Where the first block begins that the last so many queries of a sequence see."""
        if self._window is None:
            return 0
        size = self.cache.block_size
        return max(0, length - queries - self._window + 1) // size * size

    def _bucket(self, batch: AttentionBatch, chosen: list[int], *, everything: bool = False) -> _DecodeBucket:
        device = batch.block_tables.device
        size = self.cache.block_size
        offsets = [self._offset(batch.seq_lens[s]) for s in chosen]
        lengths = [batch.seq_lens[s] - offset for s, offset in zip(chosen, offsets, strict=True)]
        length = max(lengths)
        num_blocks = -(-length // size)
        ends = torch.tensor(lengths, device=device)
        begins = torch.tensor(offsets, device=device)
        tables = batch.block_tables
        if not everything:
            tables = tables.index_select(0, torch.tensor(chosen, device=device))
        first = torch.arange(num_blocks, device=device)
        if any(offsets):
            columns = (begins[:, None] // size + first).clamp(max=tables.shape[1] - 1)
            tables = tables.gather(1, columns)
        else:
            tables = tables[:, :num_blocks]
        # Past its end a sequence reads its own first block again: masked, and surely finite if it is.
        tables = torch.where(first * size < ends[:, None], tables, tables[:, :1])
        keys = torch.arange(length, device=device)
        bias = None
        passed = self._window is not None and any(batch.seq_lens[s] > self._window for s in chosen)
        if passed or min(lengths) < length:
            hidden = keys >= ends[:, None]
            if self._window is not None:
                hidden |= keys < (ends - self._window)[:, None]
            bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
            bias = bias[:, None, None, None, :]
        rows = None
        if not everything:
            rows = torch.tensor([batch.cu_seqlens_q[s] for s in chosen], device=device)
        index = self.cache.block_row_index(tables).flatten()
        queries = (begins + ends - 1)[:, None]
        return _DecodeBucket(rows, len(chosen), index, length, begins[:, None] + keys, queries, bias)

    def _chunk(self, batch: AttentionBatch, sequence: int) -> _Chunk:
        begin, end = batch.cu_seqlens_q[sequence : sequence + 2]
        length = batch.seq_lens[sequence]
        size = self.cache.block_size
        offset = self._offset(length, end - begin)
        blocks = slice(offset // size, -(-length // size))
        index = self.cache.block_row_index(batch.block_tables[sequence : sequence + 1, blocks])
        bias = None
        if end - begin < length or (self._window is not None and self._window < length):
            keys = torch.arange(offset, length, device=index.device)
            hidden = _hidden(keys, keys[-(end - begin) :], self._window)
            bias = torch.zeros(hidden.shape, dtype=self.cache.data.dtype, device=index.device)
            bias.masked_fill_(hidden, float("-inf"))
        return _Chunk(begin, end, offset, length - offset, index.flatten(), bias)
