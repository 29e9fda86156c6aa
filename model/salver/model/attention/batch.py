"""What attention needs to know of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..transfer import tensor_on

_T = TypeVar("_T")


@dataclass
class AttentionBatch:
    """The sequences of a flat, padding-free step of N rows.

    Attributes:
        cu_seqlens_q: [S + 1]; the query rows of sequence s are cu[s]:cu[s+1], at least one each.
            Rows past cu[S] are padding: neither stored nor attended, their output is finite.
        seq_lens: [S] keys of each sequence after this step; its queries are its last positions.
        block_tables: int64 [S, max_blocks], padded with 0.
        slot_mapping: int64 [N], block * block_size + offset.
        source: of an encoder-decoder, where its rows find their sources.
        prompt_lens: [S] tokens of each sequence's prompt, where positions depend on it (ropes that
            grow); empty: each row is taken for its sequence's last.
        query_starts, lengths: cu_seqlens_q and seq_lens as int64 on the device, for kernels that read them
            there; None: made when a kernel asks.
    """

    cu_seqlens_q: list[int]
    seq_lens: list[int]
    block_tables: Tensor
    slot_mapping: Tensor
    prompt_lens: list[int] = field(default_factory=list)
    source: SourceBatch | None = None
    query_starts: Tensor | None = None
    lengths: Tensor | None = None
    _derived: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Rows that are not padding."""
        return self.cu_seqlens_q[-1]

    def on_device(self) -> tuple[Tensor, Tensor]:
        """`query_starts` and `lengths`."""
        if self.query_starts is None or self.lengths is None:
            device = self.slot_mapping.device
            self.query_starts = tensor_on(device, self.cu_seqlens_q, torch.int64)
            self.lengths = tensor_on(device, self.seq_lens, torch.int64)
        return self.query_starts, self.lengths

    def derive(self, build: Callable[[AttentionBatch], _T]) -> _T:
        """`build(self)`, computed once for all layers of the step."""
        if build not in self._derived:
            self._derived[build] = build(self)
        value: _T = self._derived[build]
        return value


@dataclass
class SourceBatch(AttentionBatch):
    """Keys and values of sources, for rows that attend to all of them.

    To be read, every row is a sequence of its own, of one query at the end of its source: so no causal mask
    hides anything. To be written (`CrossAttention.remember`), sequences are sources.
    """


def over_sources(
    batch: AttentionBatch, block_tables: Sequence[Sequence[int]], lengths: Sequence[int]
) -> SourceBatch:
    """Every row of a step over the source of its sequence: so many tokens, in these blocks."""
    bounds = batch.cu_seqlens_q
    rows = [bounds[s + 1] - bounds[s] for s in range(len(lengths))]
    device = batch.block_tables.device
    return SourceBatch(
        cu_seqlens_q=list(range(batch.num_tokens + 1)),
        seq_lens=[length for length, count in zip(lengths, rows, strict=True) for _ in range(count)],
        block_tables=padded_tables(block_tables, device).repeat_interleave(
            torch.tensor(rows, device=device), dim=0
        ),
        slot_mapping=batch.slot_mapping,
    )


def into_slots(
    block_tables: Sequence[Sequence[int]], lengths: Sequence[int], num_rows: int, block_size: int, device: Any
) -> SourceBatch:
    """Where the keys and values of sources go that are read in this step, of `num_rows` with padding."""
    slots: list[int] = []
    bounds = [0]
    for table, length in zip(block_tables, lengths, strict=True):
        slots += [table[p // block_size] * block_size + p % block_size for p in range(length)]
        bounds.append(len(slots))
    slots += [i % block_size for i in range(num_rows - len(slots))]
    return SourceBatch(
        cu_seqlens_q=bounds,
        seq_lens=list(lengths),
        block_tables=padded_tables(block_tables, device),
        slot_mapping=torch.tensor(slots, device=device),
    )


def padded_tables(block_tables: Sequence[Sequence[int]], device: Any) -> Tensor:
    """int64 [S, widest], padded with the null block."""
    widest = max(map(len, block_tables))
    return torch.tensor([[*table, *[0] * (widest - len(table))] for table in block_tables], device=device)
