"""The oracle: one sequence after the other, one formula, any device. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from salver.model.attention.interface import AttentionBatch
from salver.model.cache import KVCache


class ReferenceAttention:
    """softmax(q k^T / sqrt(head_dim)) v in float64 (Vaswani et al. 2017, section 3.2.1)."""

    def __call__(self, layer: int, queries: Tensor, cache: KVCache, batch: AttentionBatch) -> Tensor:
        output = torch.zeros_like(queries)
        group = queries.shape[1] // cache.keys[layer].shape[0]
        for s, num_keys in enumerate(batch.seq_lens):
            first, last = batch.cu_seqlens_q[s], batch.cu_seqlens_q[s + 1]
            table = batch.block_tables[s]
            keys, values = (
                store[layer][:, table].flatten(1, 2)[:, :num_keys].double().repeat_interleave(group, dim=0)
                for store in (cache.keys, cache.values)
            )  # [num_heads, num_keys, head_dim]
            rows = queries[first:last].double().transpose(0, 1)  # [num_heads, rows, head_dim]
            scores = rows @ keys.transpose(1, 2) * queries.shape[2] ** -0.5
            positions = torch.arange(num_keys - (last - first), num_keys, device=queries.device)
            future = torch.arange(num_keys, device=queries.device) > positions[:, None]
            weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
            output[first:last] = (weights @ values).transpose(0, 1).to(queries.dtype)
        return output
