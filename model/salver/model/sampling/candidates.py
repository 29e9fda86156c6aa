"""What may follow a beam: the most probable tokens, with the log-probabilities that a search adds up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salver.model.sampling.rows import SamplingRow
from salver.model.sampling.sampler import process


def candidates(
    logits: Tensor, rows: Sequence[SamplingRow], counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """logits float32 [R, V], left as they are -> for each row its best `counts[row]` (token id, score).

    A score is the log-probability after the row's steps, as in transformers: they change the normalized
    values, which are not normalized again. Best first, of equal ones the lower id; without those that are
    excluded, so there may be fewer. A row's candidates depend on that row alone.
    """
    if not rows:
        return []
    scores = process(logits.log_softmax(dim=-1), rows)
    most = min(max(counts), scores.shape[1])
    best = scores.topk(most, dim=-1)
    # Of several that equal the last, topk takes any.
    last = best.values[:, -1:]
    unclear = (((scores >= last).sum(dim=-1) > most) & last[:, 0].isfinite()).tolist()
    found = []
    for row, (values, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        if unclear[row]:
            ordered = torch.sort(scores[row], descending=True, stable=True)
            values, ids = ordered.values[:most].tolist(), ordered.indices[:most].tolist()
        pairs = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        found.append([pair for pair in pairs[: counts[row]] if pair[1] > float("-inf")])
    return found
