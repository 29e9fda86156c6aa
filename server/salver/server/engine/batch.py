"""A schedule as tensors: one flat, padding-free batch for every kind of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from salver.model.attention import AttentionBatch
from salver.server.engine.scheduler import Scheduled


@dataclass(slots=True)
class Batch:
    """What the model reads in a step; N flat rows, the last ones padding."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    attention: AttentionBatch
    first_rows: list[int]  # where each scheduled part begins among the rows


def build_batch(
    scheduled: list[Scheduled], block_size: int, *, row_multiple: int, device: torch.device
) -> Batch:
    """Lays the scheduled parts one after the other.

    The number of rows is padded to `row_multiple`, which makes products give each row the
    same bits whatever stands beside it; padding rows write to the null block.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    bounds = [0]
    for item in scheduled:
        sequence, start, end = item.sequence, item.start, item.start + item.num_tokens
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        table = sequence.block_table
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        bounds.append(len(token_ids))
    padding = -len(token_ids) % row_multiple
    token_ids += [0] * padding
    positions += [0] * padding
    slots += [i % block_size for i in range(padding)]
    widest = max(len(item.sequence.block_table) for item in scheduled)
    tables = [
        item.sequence.block_table + [0] * (widest - len(item.sequence.block_table)) for item in scheduled
    ]
    return Batch(
        torch.tensor(token_ids, device=device),
        torch.tensor(positions, device=device),
        AttentionBatch(
            cu_seqlens_q=bounds,
            seq_lens=[item.start + item.num_tokens for item in scheduled],
            block_tables=torch.tensor(tables, device=device),
            slot_mapping=torch.tensor(slots, device=device),
        ),
        bounds[:-1],
    )
