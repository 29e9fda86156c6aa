"""The oracle: attention written down as its definition, in float64, on any device. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVCache
from .batch import AttentionBatch
from .scoring import Scoring


class ReferenceAttention:
    """softmax(scoring(q k)) v, sequence by sequence and head by head."""

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        out = torch.zeros_like(query)
        group = query.shape[1] // cache.num_kv_heads
        for sequence, length in enumerate(batch.seq_lens):
            begin, end = batch.cu_seqlens_q[sequence : sequence + 2]
            blocks = batch.block_tables[sequence, : -(-length // cache.block_size)]
            keys = cache.keys(layer)[blocks].flatten(0, 1)[:length].double()  # [length, kv_heads, head_dim]
            values = cache.values(layer)[blocks].flatten(0, 1)[:length].double()
            positions = torch.arange(length - (end - begin), length, device=query.device)
            key_positions = torch.arange(length, device=query.device)
            hidden = key_positions > positions[:, None]
            if scoring.window is not None:
                hidden |= key_positions <= positions[:, None] - scoring.window
            for head in range(query.shape[1]):
                scores = query[begin:end, head].double() @ keys[:, head // group].T * scoring.scale
                if scoring.cap:
                    scores = scoring.cap * torch.tanh(scores / scoring.cap)
                if scoring.alibi is not None:
                    scores = scores + scoring.alibi.bias(key_positions)[head].double()
                scores = scores.masked_fill(hidden, float("-inf"))
                if scoring.sinks is not None:
                    scores = torch.cat((scores, scoring.sinks[head].double().expand(end - begin, 1)), dim=1)
                weights = scores.softmax(-1)[:, :length]
                out[begin:end, head] = (weights @ values[:, head // group]).to(out.dtype)
        return out.flatten(1)
