"""The distribution of the next token before and after each step, for those who want to see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from salver.model.sampling.rows import SamplingRow
from salver.model.sampling.sampler import weights
from salver.model.sampling.steps import STEPS

MODEL, GREEDY = "model", "greedy"


@dataclass(frozen=True, slots=True)
class StepDistribution:
    """After the step `name`: the most probable tokens and their probabilities, most probable first.

    num_tokens: those that can be chosen. removed_mass: the probability before the step of those that
    cannot be chosen since. entropy: in nats.
    """

    name: str
    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    num_tokens: int
    removed_mass: float
    entropy: float


def distributions(logits: Tensor, row: SamplingRow, top_k: int) -> list[StepDistribution]:
    """Of the model (MODEL), then after each step that concerns the row; the last is what `sample` draws from.

    logits float32 [V], left as they are, some of them finite and none NaN. Ends early, with a step of no
    tokens, where the steps exclude all of them. `top_k`: tokens of each step.
    """
    logits = logits[None].clone()
    before = probabilities(logits)
    found = [_distribution(MODEL, before, before, top_k)]
    for step in STEPS:
        if not step.concerns(row) or not found[-1].num_tokens:
            continue
        step.apply(logits, [row])
        after = probabilities(logits)
        found.append(_distribution(step.name, before, after, top_k))
        before = after
    if row.temperature == 0 and found[-1].num_tokens:
        best = torch.zeros_like(before)
        best[0, logits.max(dim=-1).indices] = 1
        found.append(_distribution(GREEDY, before, best, top_k))
    return found


def probabilities(logits: Tensor) -> Tensor:
    """float64 [R, V] of processed logits: what `sample` draws with. Zeros where none is finite."""
    if not bool(logits.isfinite().any()):
        return torch.zeros_like(logits, dtype=torch.float64)
    found = weights(logits).double()
    return found / found.sum(dim=-1, keepdim=True)


def _distribution(name: str, before: Tensor, after: Tensor, top_k: int) -> StepDistribution:
    before, after = before[0], after[0]
    num_tokens = int((after > 0).sum())
    # Equal ones by id, as a sort that keeps the order gives them.
    top = after.sort(descending=True, stable=True)
    count = min(top_k, num_tokens)
    return StepDistribution(
        name,
        tuple(top.indices[:count].tolist()),
        tuple(top.values[:count].tolist()),
        num_tokens,
        float(before[after == 0].sum()),
        float(torch.special.entr(after).sum()),
    )
