"""Attention weights of a decoder's request: its queries and keys as they pass, then the reference formula."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from salver.model.attention import Scoring
from salver.model.attention.reference import attention_weights
from salver.server.engine.core import RowResult
from salver.server.engine.readouts import put_attention
from salver.server.engine.scheduler import Scheduled

# float32 queries and keys [n, heads, head_dim] of each layer asked for, of the heads asked for.
Chunk = list[tuple[Tensor, Tensor]]


class AttentionRows:
    """What attention multiplies of one scheduled part; the rest of the step is computed as always.

    What earlier chunks had is the sequence's `partial`, so that the part can be computed again. The
    weights are made when all is computed.
    """

    def __init__(self, item: Scheduled, first_row: int) -> None:
        encoding = item.sequence.request.encoding
        assert encoding is not None
        self.item = item
        self._rows = slice(first_row, first_row + item.num_tokens)
        self._encoding = encoding
        self._chunk: Chunk = []
        self._scoring: list[Scoring] = []

    def take(self, layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        """As OnAttention."""
        if layer in self._encoding.layers:
            heads = list(self._encoding.heads)
            of_keys = [head * key.shape[1] // query.shape[1] for head in heads]
            self._chunk.append((query[self._rows, heads].float(), key[self._rows, of_keys].float()))
            self._scoring.append(scoring.of_heads(heads))

    def read(self, result: RowResult) -> None:
        """The chunks as `partial`; the weights once all is computed."""
        sequence = self.item.sequence
        chunks = (*cast(tuple[Chunk, ...], sequence.partial or ()), self._chunk)
        result.partial = chunks
        if self.item.start + self.item.num_tokens < sequence.num_tokens:
            return
        found = []
        for place, scoring in enumerate(self._scoring):
            query, key = (torch.cat([chunk[place][i] for chunk in chunks]) for i in (0, 1))
            found.append(attention_weights(query, key, scoring).cpu())
        put_attention(torch.stack(found).numpy(), result)
