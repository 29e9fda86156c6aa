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
    bias: Tensor | None  # float [B, 1, 1, length]: -inf past a sequence's end; None: all are equally long


@dataclass(frozen=True)
class _Chunk:
    begin: int
    end: int
    length: int
    index: Tensor
    bias: Tensor | None  # [end - begin, length]: -inf in the future; None: the chunk is the whole sequence


@dataclass(frozen=True)
class _Plan:
    buckets: list[_DecodeBucket]
    chunks: list[_Chunk]


class GatheringAttention:
    """See the module. `exact` computes float32 in float64, which makes results independent of how
    keys are padded and queries chunked, up to a last rounding; half precisions in float32.
    """

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self._scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._planner: _Planner | None = None

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        if self._planner is None or self._planner.cache is not cache:
            self._planner = _Planner(cache)
        plan = batch.derive(self._planner.plan)
        if not plan.chunks and len(plan.buckets) == 1 and plan.buckets[0].rows is None:
            return self._decode(query, cache, layer, plan.buckets[0], scale)
        num_rows, num_heads, head_dim = query.shape
        out = query.new_empty((num_rows, num_heads * head_dim))
        out[batch.num_tokens :] = 0
        for bucket in plan.buckets:
            assert bucket.rows is not None
            found = self._decode(query.index_select(0, bucket.rows), cache, layer, bucket, scale)
            out.index_copy_(0, bucket.rows, found)
        for chunk in plan.chunks:
            out[chunk.begin : chunk.end] = self._chunk(
                query[chunk.begin : chunk.end], cache, layer, chunk, scale
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

    def _compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if not self.exact:
            return dtype
        return torch.float64 if dtype == torch.float32 else torch.float32

    def _decode(
        self, query: Tensor, cache: KVCache, layer: int, bucket: _DecodeBucket, scale: float
    ) -> Tensor:
        """[B, num_heads * head_dim] of query [B, num_heads, head_dim]; heads that share keys are a matrix."""
        heads, head_dim = cache.num_kv_heads, cache.head_dim
        group = query.shape[1] // heads
        dtype = self._compute_dtype(query.dtype)
        gathered = self._gather(cache, layer, bucket.index, dtype)
        keys, values = gathered.view(2, bucket.count * heads, -1, head_dim)[:, :, : bucket.length].unbind(0)
        rows = query.reshape(bucket.count * heads, group, head_dim).to(dtype) * scale
        scores = torch.bmm(rows, keys.transpose(1, 2))
        if bucket.bias is not None:
            bias = bucket.bias if bucket.bias.dtype == dtype else bucket.bias.to(dtype)
            scores.view(bucket.count, heads, group, -1).add_(bias)
        found = torch.bmm(scores.softmax(-1), values)
        return found.view(bucket.count, -1).to(query.dtype)

    def _chunk(self, query: Tensor, cache: KVCache, layer: int, chunk: _Chunk, scale: float) -> Tensor:
        """[n, num_heads * head_dim] of query [n, num_heads, head_dim]."""
        heads, head_dim = cache.num_kv_heads, cache.head_dim
        wide = self.exact and query.dtype == torch.float32
        dtype = torch.float64 if wide else query.dtype
        gathered = self._gather(cache, layer, chunk.index, dtype)
        keys, values = gathered.view(2, heads, -1, head_dim)[:, :, : chunk.length].unbind(0)
        rows = query.transpose(0, 1)  # [num_heads, n, head_dim]
        if wide:
            return self._tiles(rows.to(dtype) * scale, keys, values).to(query.dtype)
        found = F.scaled_dot_product_attention(  # float32 inside, whatever it is given
            rows[None],
            keys[None],
            values[None],
            attn_mask=chunk.bias,
            is_causal=chunk.bias is None,
            scale=scale,
            enable_gqa=True,
        )
        return found[0].transpose(0, 1).flatten(1)

    def _tiles(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[n, num_heads * head_dim] of query [num_heads, n, head_dim], some rows at a time.

        Heads that share keys are one matrix; keys after a tile's last row are not touched.
        """
        heads, length, head_dim = keys.shape
        count = query.shape[1]
        group = query.shape[0] // heads
        past = length - count
        out = query.new_empty((count, heads, group, head_dim))
        for begin in range(0, count, EXACT_ROWS):
            end = min(begin + EXACT_ROWS, count)
            seen = past + end
            rows = query[:, begin:end].reshape(heads, group * (end - begin), head_dim)
            scores = torch.bmm(rows, keys[:, :seen].transpose(1, 2)).view(heads, group, end - begin, seen)
            corner = torch.ones((end - begin, end - begin), dtype=torch.bool, device=query.device).triu_(1)
            scores[..., past + begin :].masked_fill_(corner, float("-inf"))
            weights = scores.softmax(-1).view(heads, group * (end - begin), seen)
            found = torch.bmm(weights, values[:, :seen]).view(heads, group, end - begin, head_dim)
            out[begin:end] = found.permute(2, 0, 1, 3)
        return out.flatten(1)


class _Planner:
    """Makes the plan of a step for one cache."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def plan(self, batch: AttentionBatch) -> _Plan:
        block_size = self.cache.block_size
        bounds = batch.cu_seqlens_q
        sequences = range(len(batch.seq_lens))
        decodes = [s for s in sequences if bounds[s + 1] - bounds[s] == 1]
        chunks = [self._chunk(batch, s) for s in sequences if bounds[s + 1] - bounds[s] > 1]
        decodes.sort(key=lambda s: -batch.seq_lens[s])  # stable: equal lengths stay in order
        buckets: list[_DecodeBucket] = []
        begin = 0
        while begin < len(decodes):
            longest = batch.seq_lens[decodes[begin]]
            padded = -(-longest // block_size) * block_size
            shortest = min(longest * BUCKET_WASTE, longest - BUCKET_SLACK)
            end = begin + 1
            while (
                end < len(decodes)
                and batch.seq_lens[decodes[end]] >= shortest
                and (end + 1 - begin) * padded <= BUCKET_TOKENS
            ):
                end += 1
            buckets.append(self._bucket(batch, decodes[begin:end]))
            begin = end
        if len(buckets) == 1 and not chunks and batch.slot_mapping.numel() == len(decodes):
            buckets = [self._bucket(batch, sorted(decodes), everything=True)]
        return _Plan(buckets, chunks)

    def _bucket(self, batch: AttentionBatch, chosen: list[int], *, everything: bool = False) -> _DecodeBucket:
        device = batch.block_tables.device
        lengths = [batch.seq_lens[s] for s in chosen]
        length = max(lengths)
        num_blocks = -(-length // self.cache.block_size)
        ends = torch.tensor(lengths, device=device)
        tables = batch.block_tables
        if not everything:
            tables = tables.index_select(0, torch.tensor(chosen, device=device))
        tables = tables[:, :num_blocks]
        # Past its end a sequence reads its own first block again: masked, and surely finite if it is.
        first = torch.arange(num_blocks, device=device) * self.cache.block_size
        tables = torch.where(first < ends[:, None], tables, tables[:, :1])
        bias = None
        if min(lengths) < length:
            past = torch.arange(length, device=device) >= ends[:, None]
            bias = torch.zeros(past.shape, device=device).masked_fill_(past, float("-inf"))[:, None, None, :]
        rows = None
        if not everything:
            rows = torch.tensor([batch.cu_seqlens_q[s] for s in chosen], device=device)
        index = self.cache.block_row_index(tables).flatten()
        return _DecodeBucket(rows, len(chosen), index, length, bias)

    def _chunk(self, batch: AttentionBatch, sequence: int) -> _Chunk:
        begin, end = batch.cu_seqlens_q[sequence : sequence + 2]
        length = batch.seq_lens[sequence]
        num_blocks = -(-length // self.cache.block_size)
        index = self.cache.block_row_index(batch.block_tables[sequence : sequence + 1, :num_blocks])
        bias = None
        if end - begin < length:
            positions = torch.arange(length, device=index.device)
            future = positions > positions[length - (end - begin) :, None]
            bias = torch.zeros(future.shape, dtype=self.cache.data.dtype, device=index.device)
            bias.masked_fill_(future, float("-inf"))
        return _Chunk(begin, end, length, index.flatten(), bias)
