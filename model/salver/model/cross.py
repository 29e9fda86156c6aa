"""A decoder layer's attention to the source, which an encoder has read."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import Attention, Scoring, SourceBatch
from .cache import KVCache
from .layers import Linear
from .spec import ModelSpec


class CrossAttention(nn.Module):
    """Queries of the output's tokens; keys and values of the encoder's hidden states, made once a source."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        query, key, value = spec.qkv_sizes
        self.index = index
        self.num_kv_heads, self.head_dim = spec.num_kv_heads, spec.head_dim
        self.scoring = Scoring(spec.attention_scale)
        self.query = Linear(query, spec.hidden_size, bias=spec.cross_bias)
        self.key_value = Linear(key + value, spec.hidden_size, bias=spec.cross_bias)
        self.out = Linear(spec.hidden_size, query, bias=spec.cross_bias)

    def remember(self, hidden: Tensor, cache: KVCache, batch: SourceBatch) -> None:
        """Stores the keys and values of sources' hidden states [N, hidden] at the slots of the batch."""
        heads = self.key_value(hidden).view(hidden.shape[0], 2, self.num_kv_heads, self.head_dim)
        cache.write(self.index, heads[:, 0], heads[:, 1], batch)

    def forward(self, x: Tensor, cache: KVCache, attention: Attention, batch: SourceBatch) -> Tensor:
        """[N, hidden] of [N, hidden]; every row attends to the whole of its source."""
        query = self.query(x).view(x.shape[0], -1, self.head_dim)
        out: Tensor = self.out(attention(query, cache, self.index, batch, self.scoring))
        return out
