"""The oracle: attention written down as its definition, in float64, on any device. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVCache
from .batch import AttentionBatch
from .scoring import Scoring


class ReferenceAttention:
    """softmax(scoring(q k)) v, sequence by sequence."""

    reads_stale = True

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        out = torch.zeros_like(query)
        for sequence, length in enumerate(batch.seq_lens):
            begin, end = batch.cu_seqlens_q[sequence : sequence + 2]
            blocks = batch.block_tables[sequence, : -(-length // cache.block_size)]
            keys = cache.keys(layer)[blocks].flatten(0, 1)[:length].double()  # [length, kv_heads, head_dim]
            values = cache.values(layer)[blocks].flatten(0, 1)[:length].double()
            weights = attention_weights(query[begin:end].double(), keys, scoring)
            values = values.repeat_interleave(query.shape[1] // values.shape[1], dim=1)
            out[begin:end] = torch.einsum("hnl,lhd->nhd", weights, values).to(out.dtype)
        return out.flatten(1)


def attention_weights(query: Tensor, keys: Tensor, scoring: Scoring, *, causal: bool = True) -> Tensor:
    """[heads, n, L] of queries [n, heads, head_dim] at the last n positions of keys [L, kv_heads, head_dim].

    In their dtype. Rows sum to 1; with sinks, to what these leave. Not `causal`: every query sees every key.
    """
    (count, heads, _), length = query.shape, keys.shape[0]
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    scores = torch.einsum("nhd,lhd->hnl", query, keys) * scoring.scale
    if scoring.cap:
        scores = scoring.cap * torch.tanh(scores / scoring.cap)
    positions = torch.arange(length - count, length, device=query.device)
    key_positions = torch.arange(length, device=query.device)
    if scoring.alibi is not None:
        scores = scores + scoring.alibi.bias(key_positions)[:, None].to(scores.dtype)
    if scoring.distances is not None:
        scores = scores + scoring.distance_bias(key_positions, positions).to(scores.dtype)
    if causal:
        hidden = key_positions > positions[:, None]
        if scoring.window is not None:
            hidden |= key_positions <= positions[:, None] - scoring.window
        scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype).view(-1, 1, 1).expand(heads, count, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return scores.softmax(-1)[..., :length]
