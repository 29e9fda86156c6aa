"""A schedule as tensors: one flat, padding-free batch for every kind of work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from salver.model.attention import AttentionBatch
from salver.model.transfer import tensor_on


@dataclass(slots=True)
class Part:
    """Consecutive tokens of one sequence, the first at position `start`, and the sequence's blocks."""

    token_ids: list[int]
    start: int
    block_table: list[int]
    prompt_len: int = 0  # of the sequence, for positions that depend on it

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class Batch:
    """What the model reads in a step; N flat rows, the last ones padding."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    attention: AttentionBatch
    first_rows: list[int]  # where each part begins among the rows


def build_batch(parts: list[Part], block_size: int, *, row_multiple: int, device: torch.device) -> Batch:
    """Lays the parts one after the other.

    The number of rows is padded to `row_multiple`, which makes products give each row the
    same bits whatever stands beside it; padding rows write to the null block.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    bounds = [0]
    for part in parts:
        token_ids += part.token_ids
        positions += range(part.start, part.end)
        table = part.block_table
        slots += [table[p // block_size] * block_size + p % block_size for p in range(part.start, part.end)]
        bounds.append(len(token_ids))
    padding = -len(token_ids) % row_multiple
    token_ids += [0] * padding
    positions += [0] * padding
    slots += [i % block_size for i in range(padding)]
    widest = max(len(part.block_table) for part in parts)
    lengths = [part.end for part in parts]
    # One transfer for all: on a GPU each has its price.
    lists = [token_ids, positions, slots, bounds, lengths]
    lists += [part.block_table + [0] * (widest - len(part.block_table)) for part in parts]
    packed = tensor_on(device, list(chain.from_iterable(lists)), torch.int64)
    rows = len(token_ids)
    ids, places, slot_mapping, starts, ends, tables = torch.split(
        packed, [rows, rows, rows, len(bounds), len(parts), widest * len(parts)]
    )
    return Batch(
        ids,
        places,
        AttentionBatch(
            cu_seqlens_q=bounds,
            seq_lens=lengths,
            block_tables=tables.view(len(parts), widest),
            slot_mapping=slot_mapping,
            prompt_lens=[part.prompt_len for part in parts],
            query_starts=starts,
            lengths=ends,
        ),
        bounds[:-1],
    )
