"""Attention weights of a decoder's request: its queries and keys as they pass, then the reference formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from salver.model.attention import Scoring
from salver.model.attention.reference import attention_weights
from salver.model.encoder import Masks, SelfAttention
from salver.server.engine.core import RowResult
from salver.server.engine.readouts import put_attention
from salver.server.engine.request import AttentionOf
from salver.server.engine.schedule import Scheduled
from salver.server.engine.sequence import Sequence
from salver.server.engine.source_reader import OnSource, SourceReader

# Of each layer asked for, of the heads asked for: float32 queries [n, heads, head_dim], and keys likewise;
# or the weights of a source [heads, n, n] alone.
Chunk = list[tuple[Tensor, ...]]


class AttentionRows:
    """What attention multiplies of one scheduled part; the rest of the step is computed as always.

    What earlier chunks had is the sequence's `partial`, so that the part can be computed again. The
    weights are made when all is computed.
    """

    def __init__(self, item: Scheduled, first_row: int) -> None:
        encoding = item.sequence.request.encoding
        assert encoding is not None
        self.item = item
        self.of = encoding.attention_of
        self._rows = slice(first_row, first_row + item.num_tokens)
        self._encoding = encoding
        self._heads = list(encoding.heads)
        self._chunk: Chunk = []
        self._scoring: list[Scoring] = []
        self._num_heads = 0

    def take(self, layer: int, query: Tensor, key: Tensor | None, scoring: Scoring) -> None:
        """As OnAttention."""
        if layer not in self._encoding.layers or self.of is not _attention_of(key):
            return
        self._num_heads = query.shape[1]
        found = [query[self._rows, self._heads].float()]
        if key is not None:
            found.append(key[self._rows, self._of_keys(key.shape[1])].float())
        self._chunk.append(tuple(found))
        self._scoring.append(scoring.of_heads(self._heads))

    def take_source(self, layer: int, attention: SelfAttention, heads: Tensor, masks: Masks) -> None:
        """As OnHeads, of the sequence's source alone."""
        if layer in self._encoding.layers:
            self._chunk.append((attention.weights(heads, self._heads, masks).cpu(),))

    def read(self, result: RowResult, sources: SourceReader | None) -> None:
        """The chunks as `partial`; the weights once all is computed."""
        sequence = self.item.sequence
        chunks = (*cast(tuple[Chunk, ...], sequence.partial or ()), self._chunk)
        result.partial = chunks
        if self.item.start + self.item.num_tokens < sequence.num_tokens:
            return
        if self.of is AttentionOf.SOURCE:
            found = [weights for chunk in chunks for (weights,) in chunk]  # all of the first chunk
        else:
            found = [
                self._weights(place, [chunk[place] for chunk in chunks], sources).cpu()
                for place in range(len(self._scoring))
            ]
        put_attention(torch.stack(found).numpy(), result)

    def _weights(self, place: int, chunks: list[tuple[Tensor, ...]], sources: SourceReader | None) -> Tensor:
        """[heads, queries, keys] of a layer."""
        query, scoring = torch.cat([chunk[0] for chunk in chunks]), self._scoring[place]
        if self.of is AttentionOf.OWN:
            return attention_weights(query, torch.cat([chunk[1] for chunk in chunks]), scoring)
        assert sources is not None, "there is no source to attend to"
        keys = sources.keys(self.item.sequence, self._encoding.layers[place])
        return attention_weights(query, keys[:, self._of_keys(keys.shape[1])], scoring, causal=False)

    def _of_keys(self, num_kv_heads: int) -> list[int]:
        """Which heads of keys the heads asked for see."""
        return [head * num_kv_heads // self._num_heads for head in self._heads]


def source_observer(observed: Iterable[AttentionRows]) -> OnSource | None:
    """Tells each of these that wants it of its source; None: nobody does."""
    wanted: dict[Sequence, AttentionRows] = {
        rows.item.sequence: rows for rows in observed if rows.of is AttentionOf.SOURCE
    }

    def observe(
        sequence: Sequence, layer: int, attention: SelfAttention, heads: Tensor, masks: Masks
    ) -> None:
        if sequence in wanted:
            wanted[sequence].take_source(layer, attention, heads, masks)

    return observe if wanted else None


def _attention_of(key: Tensor | None) -> AttentionOf:
    return AttentionOf.CROSS if key is None else AttentionOf.OWN
