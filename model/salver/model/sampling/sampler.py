"""Chooses the next token of every row: the best, or one drawn with the row's own noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from salver.model.noise import uniforms
from salver.model.sampling.rows import SamplingRow
from salver.model.sampling.steps import STEPS
from salver.model.transfer import on_device, tensor_on

INVALID = -1
_FARTHEST = 87.0  # exp(-87) is still a normal number


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """`choose` as a list: waits for the device."""
    if not rows:
        return []
    tokens: list[int] = choose(logits, rows).tolist()
    return tokens


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits float32 [R, V], left as they are -> int64 [R], one token id a row, on their device.

    A drawn token is the inverse of the cumulative distribution, in vocabulary order, at the
    row's uniform. A row's token depends on that row alone. INVALID for a row without a
    finite logit, or with NaN. Waits for the device where a row asks for top_p alone.
    """
    logits = process(logits, rows)
    values, tokens = _best(logits)
    drawing = [i for i, row in enumerate(rows) if row.temperature > 0]
    if len(drawing) == len(rows):
        tokens = _draw(logits, rows)
    elif drawing:
        index = tensor_on(logits.device, drawing)
        drawn = _draw(logits.index_select(0, index), [rows[i] for i in drawing])
        tokens = tokens.index_copy(0, index, drawn)
    # What was drawn from no weights, or from NaN, is no token.
    return torch.where(values.isfinite(), tokens, INVALID)


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row, NaN if there is one, and where it is first."""
    if logits.device.type != "cpu":
        best = logits.max(dim=-1)
        return best.values, best.indices
    # numpy compares sixteen at a time: a quarter of torch's time, which is a fortieth of an int8 step of 32.
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.gather(1, tokens[:, None]).squeeze(1), tokens


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
            index = tensor_on(logits.device, concerned)
            part = logits.index_select(0, index)
            step.apply(part, [rows[i] for i in concerned])
            logits.index_copy_(0, index, part)
    return logits


def weights(logits: Tensor) -> Tensor:
    """float32 [R, V]: a token is drawn in proportion to this, of processed logits.

    0 for a logit that is `_FARTHEST` below the best, which could not be drawn: a library's exp takes many
    times as long for what is out of its range, as every logit is that some step excluded.
    """
    below = (logits - logits.amax(dim=-1, keepdim=True)).clamp_(min=-_FARTHEST)
    return F.threshold(below.exp_(), 2 * math.exp(-_FARTHEST), 0.0, inplace=True)


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """int64 [R]. The noise is made on the host, which knows all that it depends on: a hundred small
    operations on a device would cost more than to send a number for each row.
    """
    cumulative = weights(logits).cumsum(dim=-1, dtype=torch.float64)
    noise = uniforms(
        [row.seed for row in rows],
        [row.sample_index for row in rows],
        [len(row.output_token_ids) for row in rows],
    )
    target = on_device(torch.from_numpy(noise), logits.device)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative weight exceeds the target, never one of weight zero.
    found = torch.searchsorted(cumulative, target, right=True)
    # Rounding can put the target on the total itself: then the last token of any weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last)[:, 0]
