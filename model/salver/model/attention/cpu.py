"""Attention in plain torch, laid out for speed.

Nothing in torch reads a paged cache in place on the CPU, so keys and values are gathered
first. Sequences with one query (decode) are gathered together, in groups of similar length so
that a long one does not pad the others, and computed by batched products. Sequences with
several queries (chunks of prompts) go one by one through scaled_dot_product_attention.
Everything that depends on the step alone is derived once, in the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from salver.model.attention.interface import AttentionBatch
from salver.model.cache import KVCache


@dataclass(slots=True)
class _DecodeGroup:
    """S sequences with one query each, padded to L keys."""

    rows: Tensor  # [S], their rows in the batch
    blocks: Tensor  # [num_kv_heads * S * blocks], into the flattened cache
    mask: Tensor  # [1, S, 1, L], 0 or -inf
    size: int
    num_keys: int


@dataclass(slots=True)
class _Chunk:
    """One sequence with several queries."""

    first: int
    last: int
    blocks: Tensor  # [num_kv_heads * blocks]
    num_keys: int
    mask: Tensor | None  # [queries, num_keys], True where a key is seen; None: plainly causal


@dataclass(slots=True)
class _Plan:
    groups: list[_DecodeGroup] = field(default_factory=list)
    chunks: list[_Chunk] = field(default_factory=list)


class BatchedAttention:
    """Gathers, then multiplies in `compute_dtype`."""

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype

    def __call__(self, layer: int, queries: Tensor, cache: KVCache, batch: AttentionBatch) -> Tensor:
        if batch.plan is None:
            batch.plan = _make_plan(batch, cache, self.compute_dtype)
        plan: _Plan = batch.plan
        output = torch.zeros_like(queries)
        keys, values = cache.keys[layer].flatten(0, 1), cache.values[layer].flatten(0, 1)
        for group in plan.groups:
            output[group.rows] = self._decode(queries[group.rows], keys, values, group, cache)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.last)
            output[rows] = self._chunk(queries[rows], keys, values, chunk, cache)
        return output

    def _gather(self, store: Tensor, blocks: Tensor, *shape: int) -> Tensor:
        return store.index_select(0, blocks).view(*shape).to(self.compute_dtype)

    def _decode(
        self, queries: Tensor, keys: Tensor, values: Tensor, group: _DecodeGroup, cache: KVCache
    ) -> Tensor:
        size, num_heads, head_dim = queries.shape
        kv_heads = cache.keys[0].shape[0]
        per_kv = num_heads // kv_heads
        shape = (kv_heads * size, group.num_keys, head_dim)
        q = queries.view(size, kv_heads, per_kv, head_dim).transpose(0, 1)
        q = q.to(self.compute_dtype).reshape(kv_heads * size, per_kv, head_dim)
        scores = torch.bmm(q, self._gather(keys, group.blocks, *shape).transpose(1, 2))
        scores = scores.view(kv_heads, size, per_kv, group.num_keys)
        precision = torch.promote_types(self.compute_dtype, torch.float32)
        weights = (scores.to(precision) * head_dim**-0.5 + group.mask).softmax(dim=-1)
        weights = weights.to(self.compute_dtype).view(kv_heads * size, per_kv, group.num_keys)
        mixed = torch.bmm(weights, self._gather(values, group.blocks, *shape))
        mixed = mixed.view(kv_heads, size, per_kv, head_dim).transpose(0, 1)
        return mixed.reshape(size, num_heads, head_dim).to(queries.dtype)

    def _chunk(self, queries: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk, cache: KVCache) -> Tensor:
        kv_heads, head_dim = cache.keys[0].shape[0], queries.shape[2]
        k, v = (
            self._gather(store, chunk.blocks, kv_heads, -1, head_dim)[None, :, : chunk.num_keys]
            for store in (keys, values)
        )
        mixed = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None].to(self.compute_dtype),
            k,
            v,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=queries.shape[1] != kv_heads,
        )
        return mixed[0].transpose(0, 1).to(queries.dtype)


def _make_plan(batch: AttentionBatch, cache: KVCache, compute_dtype: torch.dtype) -> _Plan:
    plan = _Plan()
    bounds, device = batch.cu_seqlens_q, batch.block_tables.device
    heads = torch.arange(cache.keys[0].shape[0], device=device) * cache.num_blocks
    decoding: list[tuple[int, int]] = []  # blocks, sequence
    for s, num_keys in enumerate(batch.seq_lens):
        first, last = bounds[s], bounds[s + 1]
        num_blocks = -(-num_keys // cache.block_size)
        if last - first == 1:
            decoding.append((num_blocks, s))
            continue
        mask = None
        if last - first != num_keys:
            positions = torch.arange(num_keys - (last - first), num_keys, device=device)
            mask = torch.arange(num_keys, device=device) <= positions[:, None]
        blocks = (heads[:, None] + batch.block_tables[s, :num_blocks]).flatten()
        plan.chunks.append(_Chunk(first, last, blocks, num_keys, mask))
    for members in _similar(sorted(decoding)):
        widest = members[-1][0]
        index = torch.tensor([s for _, s in members], device=device)
        lengths = torch.tensor([batch.seq_lens[s] for _, s in members], device=device)
        unseen = torch.arange(widest * cache.block_size, device=device) >= lengths[:, None]
        precision = torch.promote_types(compute_dtype, torch.float32)
        mask = torch.zeros(unseen.shape, dtype=precision, device=device).masked_fill(unseen, float("-inf"))
        plan.groups.append(
            _DecodeGroup(
                rows=torch.tensor([bounds[s] for _, s in members], device=device),
                blocks=(heads[:, None, None] + batch.block_tables[index, :widest]).flatten(),
                mask=mask[None, :, None],
                size=len(members),
                num_keys=widest * cache.block_size,
            )
        )
    return plan


def _similar(decoding: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cuts a list sorted by length where the next one is half as long again as the group's first."""
    groups: list[list[tuple[int, int]]] = []
    for entry in decoding:
        if not groups or entry[0] > max(4, 1.5 * groups[-1][0][0]):
            groups.append([])
        groups[-1].append(entry)
    return groups
