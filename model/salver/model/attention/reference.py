"""The oracle: attention written down as its definition, in float64, on any device. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVCache
from .batch import AttentionBatch


class ReferenceAttention:
    """softmax(q k / scale) v, sequence by sequence and head by head."""

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        out = torch.zeros_like(query)
        group = query.shape[1] // cache.num_kv_heads
        for sequence, length in enumerate(batch.seq_lens):
            begin, end = batch.cu_seqlens_q[sequence : sequence + 2]
            blocks = batch.block_tables[sequence, : -(-length // cache.block_size)]
            keys = cache.keys(layer)[blocks].flatten(0, 1)[:length].double()  # [length, kv_heads, head_dim]
            values = cache.values(layer)[blocks].flatten(0, 1)[:length].double()
            positions = torch.arange(length - (end - begin), length, device=query.device)
            future = torch.arange(length, device=query.device) > positions[:, None]
            for head in range(query.shape[1]):
                scores = query[begin:end, head].double() @ keys[:, head // group].T * scale
                weights = scores.masked_fill(future, float("-inf")).softmax(-1)
                out[begin:end, head] = (weights @ values[:, head // group]).to(out.dtype)
        return out.flatten(1)
