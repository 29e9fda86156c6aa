"""Chooses the next token of every row: the best, or one drawn with the row's own noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salver.model.noise import uniforms
from salver.model.sampling.rows import SamplingRow
from salver.model.sampling.steps import STEPS

INVALID = -1


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """logits float32 [R, V], left as they are -> one token id a row.

    A drawn token is the inverse of the cumulative distribution, in vocabulary order, at the
    row's uniform. A row's token depends on that row alone. INVALID for a row without a
    finite logit, or with NaN.
    """
    if not rows:
        return []
    logits = process(logits, rows)
    best = logits.max(dim=-1)
    tokens: list[int] = torch.where(best.values.isfinite(), best.indices, INVALID).tolist()
    drawing = [i for i, row in enumerate(rows) if row.temperature > 0 and tokens[i] != INVALID]
    if drawing:
        for i, token in zip(drawing, _draw(logits[drawing], [rows[i] for i in drawing]), strict=True):
            tokens[i] = token
    return tokens


def process(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The logits after all steps, as a copy where any step concerns any row."""
    copied = False
    for step in STEPS:
        concerned = [i for i, row in enumerate(rows) if step.concerns(row)]
        if not concerned:
            continue
        if not copied:
            logits, copied = logits.clone(), True
        if len(concerned) == len(rows):
            step.apply(logits, rows)
        else:
            index = torch.tensor(concerned, device=logits.device)
            part = logits.index_select(0, index)
            step.apply(part, [rows[i] for i in concerned])
            logits.index_copy_(0, index, part)
    return logits


def weights(logits: Tensor) -> Tensor:
    """float32 [R, V]: a token is drawn in proportion to this, of processed logits."""
    return (logits - logits.amax(dim=-1, keepdim=True)).exp()


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    cumulative = weights(logits).cumsum(dim=-1, dtype=torch.float64)
    noise = uniforms(
        [row.seed for row in rows],
        [row.sample_index for row in rows],
        [len(row.output_token_ids) for row in rows],
    )
    target = torch.from_numpy(noise).to(logits.device)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative weight exceeds the target, never one of weight zero.
    found = torch.searchsorted(cumulative, target, right=True)
    # Rounding can put the target on the total itself: then the last token of any weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    drawn: list[int] = torch.minimum(found, last)[:, 0].tolist()
    return drawn
