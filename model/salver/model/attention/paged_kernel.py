"""Attention through the paged cache as a Triton kernel: everything that `Scoring` can say, any head size.

Triton comes with torch for CUDA. Its interpreter runs the kernel without a GPU (`make test-triton`).

One algorithm for prefill and decoding: a tile is ROWS rows (queries times the heads that share keys), and
walks the keys of its sequence from front to back in tiles of KEYS at fixed absolute positions. Tiles that a
row does not see multiply its sums by one and add zero. So with equal ROWS and KEYS a row has the same bits
whatever stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache import KVCache
from ..transfer import tensor_on
from .batch import AttentionBatch
from .scoring import Scoring


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, and how it is computed."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(head_dim: int, itemsize: int, *, few_queries: bool) -> Tile:
    """`few_queries`: for steps of decoding alone, where most of a large tile would be empty."""
    wide = head_dim * itemsize > 256
    if wide:  # latents, or float32: the sums of more rows would not fit in the registers
        return Tile(16, 16 if head_dim > 256 else 32, 4, 1 if head_dim > 256 else 2)
    return Tile(16, 64, 4, 3) if few_queries else Tile(64, 64, 4, 2)


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _to_bfloat16(x):
    # By hand: to the nearest, ties to even, which the interpreter's own conversion is not.
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, WIDEN: tl.constexpr):
    if WIDEN:  # numpy, which multiplies in the interpreter, knows no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    query, data, out, tables, query_starts, lengths, tiles, slopes, sinks, scale, cap, multiplier,
    query_stride, table_stride, block_stride, head_stride, value_offset,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, ALIBI: tl.constexpr, ROUNDED: tl.constexpr, SINKS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    # HEADS of the GROUP that shares keys are in a tile, times ROWS // HEADS queries.
    queries: tl.constexpr = ROWS // HEADS
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1) // parts
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    begin = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - begin
    length = tl.load(lengths + sequence)

    rows = tl.arange(0, ROWS)
    index = first + rows // HEADS
    member = tl.program_id(1) % parts * HEADS + rows % HEADS
    head = kv_head * GROUP + member
    valid = (index < count) & (member < GROUP) & (rows < queries * HEADS)
    position = length - count + index
    d1 = tl.arange(0, D1)
    row = (begin + index) * query_stride + head * HEAD_DIM
    q1 = tl.load(
        query + row[:, None] + d1[None, :], mask=valid[:, None] & (d1 < HEAD_DIM)[None, :], other=0.0
    )
    sum1 = tl.zeros((ROWS, D1), dtype=tl.float32)
    if D2:
        d2 = D1 + tl.arange(0, D2)
        q2 = tl.load(
            query + row[:, None] + d2[None, :], mask=valid[:, None] & (d2 < HEAD_DIM)[None, :], other=0.0
        )
        sum2 = tl.zeros((ROWS, D2), dtype=tl.float32)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32)
        total = total + 1.0
    if ALIBI:
        slope = tl.load(slopes + head, mask=valid, other=0.0).to(tl.float32)
        if ROUNDED:
            slope = _to_bfloat16(slope)

    end = tl.minimum(length, length - count + first + queries)
    start = 0
    if WINDOW:
        start = tl.maximum(0, length - count + first - WINDOW + 1) // KEYS * KEYS
    for at in range(start, end, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(tables + sequence * table_stride + key // BLOCK_SIZE, mask=inside, other=0)
        stored = block * block_stride + kv_head * head_stride + key % BLOCK_SIZE * HEAD_DIM
        in1 = inside[:, None] & (d1 < HEAD_DIM)[None, :]
        k1 = tl.load(data + stored[:, None] + d1[None, :], mask=in1, other=0.0)
        scores = _product(q1, tl.trans(k1), WIDEN)
        if D2:
            in2 = inside[:, None] & (d2 < HEAD_DIM)[None, :]
            k2 = tl.load(data + stored[:, None] + d2[None, :], mask=in2, other=0.0)
            scores += _product(q2, tl.trans(k2), WIDEN)
        scores = scores * scale
        if CAPPED:
            scores = cap * _tanh(scores / cap)
        if ALIBI:
            if ROUNDED:
                bias = _to_bfloat16(_to_bfloat16(key.to(tl.float32))[None, :] * slope[:, None])
            else:
                bias = key.to(tl.float32)[None, :] * slope[:, None]
            scores += bias * multiplier
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - level[:, None])
        kept = tl.exp(top - level)
        total = total * kept + tl.sum(weights, 1)
        v1 = tl.load(data + value_offset + stored[:, None] + d1[None, :], mask=in1, other=0.0)
        sum1 = sum1 * kept[:, None] + _product(weights.to(v1.dtype), v1, WIDEN)
        if D2:
            v2 = tl.load(data + value_offset + stored[:, None] + d2[None, :], mask=in2, other=0.0)
            sum2 = sum2 * kept[:, None] + _product(weights.to(v2.dtype), v2, WIDEN)
        top = higher
    total = tl.where(total > 0.0, total, 1.0)
    to = (begin + index) * (tl.num_programs(1) // parts * GROUP * HEAD_DIM) + head * HEAD_DIM
    found = (sum1 / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + to[:, None] + d1[None, :], found, mask=valid[:, None] & (d1 < HEAD_DIM)[None, :])
    if D2:
        found = (sum2 / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + to[:, None] + d2[None, :], found, mask=valid[:, None] & (d2 < HEAD_DIM)[None, :])


def paged_attention(
    query: Tensor,
    cache: KVCache,
    layer: int,
    batch: AttentionBatch,
    scoring: Scoring,
    tiles: Tensor,
    tile: Tile,
) -> Tensor:
    """As `Attention`; `tiles` is what `query_tiles` says for `queries_of` this tile."""
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // cache.num_kv_heads
    heads = min(group, tile.rows)
    first_half = _first_half(head_dim)
    second_half = _power_of_two(head_dim - first_half) if head_dim > first_half else 0
    query = query if query.stride()[1:] == (head_dim, 1) else query.contiguous()
    out = query.new_empty((num_rows, num_heads * head_dim))
    if batch.num_tokens < num_rows:
        out[batch.num_tokens :] = 0
    starts, lengths = batch.on_device()
    data = cache.data[layer]
    alibi, sinks = scoring.alibi, scoring.sinks
    _attend[(len(tiles), cache.num_kv_heads * -(-group // heads))](
        query, data, out, batch.block_tables, starts, lengths, tiles,
        query if alibi is None else alibi.slopes, query if sinks is None else sinks,
        scoring.scale, scoring.cap, 1.0 if alibi is None else alibi.multiplier,
        query.stride(0), batch.block_tables.stride(0), data.stride(0), data.stride(2), data.stride(1),
        GROUP=group, HEADS=heads, HEAD_DIM=head_dim, BLOCK_SIZE=cache.block_size,
        D1=first_half, D2=second_half, ROWS=tile.rows, KEYS=tile.keys, WINDOW=scoring.window or 0,
        CAPPED=bool(scoring.cap), ALIBI=alibi is not None, ROUNDED=alibi is not None and alibi.rounded,
        SINKS=sinks is not None, WIDEN=query.dtype == torch.bfloat16 and not query.is_cuda,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def queries_of(tile: Tile, group: int) -> int:
    """How many queries of a sequence a tile has, where `group` heads share keys."""
    return tile.rows // min(group, tile.rows)


def query_tiles(batch: AttentionBatch, queries: int) -> Tensor:
    """int64 [T, 2] on the device: each tile's sequence, and the first of its queries there."""
    bounds, device = batch.cu_seqlens_q, batch.slot_mapping.device
    if bounds[-1] == len(batch.seq_lens):  # decoding: made on the device, for a graph may be captured
        sequences = torch.arange(bounds[-1], device=device)
        return torch.stack((sequences, torch.zeros_like(sequences)), dim=1)
    pairs = [
        (sequence, first)
        for sequence in range(len(bounds) - 1)
        for first in range(0, bounds[sequence + 1] - bounds[sequence], queries)
    ]
    return tensor_on(device, pairs, torch.int64)


def _first_half(head_dim: int) -> int:
    """A head is loaded as two powers of two, at least 16 each: 96 as 64 and 32, 576 as 512 and 64."""
    largest = 1 << (head_dim.bit_length() - 1)
    return max(16, largest)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
