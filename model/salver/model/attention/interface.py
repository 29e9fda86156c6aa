"""What attention reads, and what an implementation must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from salver.model.cache import KVCache


@dataclass(slots=True)
class AttentionBatch:
    """Which rows of a flat batch belong to which sequence, and where its keys are.

    Attributes:
        cu_seqlens_q: [S + 1]; sequence s has the query rows cu_seqlens_q[s] : cu_seqlens_q[s + 1].
            Rows past the last bound are padding: their slots lie in block 0, their output is nobody's.
        seq_lens: [S]; keys of each sequence after this step. Its queries are its last positions.
        block_tables: int64 [S, max_blocks], padded with 0.
        slot_mapping: int64 [N]; block * block_size + offset of every row.
        plan: what an implementation derived from the above, once for all layers.
    """

    cu_seqlens_q: list[int]
    seq_lens: list[int]
    block_tables: Tensor
    slot_mapping: Tensor
    plan: Any = None


class Attention(Protocol):
    """Causal attention of every query row over its sequence's keys in the cache."""

    def __call__(self, layer: int, queries: Tensor, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """queries [N, num_heads, head_dim] -> [N, num_heads, head_dim].

        The keys and values of these rows are in the cache already. Scale 1 / sqrt(head_dim).
        """
        ...
