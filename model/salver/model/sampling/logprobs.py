"""Log-probabilities of raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from salver.model.transfer import tensor_on


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one position. rank 1 is the most probable; `top` is sorted, lower ids first among equals.

    `named` are those of the tokens that were asked for by name, in their order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
    named: tuple[tuple[int, float], ...] = ()


def token_logprobs(
    logits: Tensor,
    token_ids: Sequence[int],
    top_k: Sequence[int],
    named: Sequence[tuple[int, ...]] | None = None,
) -> list[TokenLogprobs]:
    """logits float32 [R, V]; for each row a token, a number of most probable ones, and named ones."""
    if not token_ids:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    index = tensor_on(logits.device, token_ids)[:, None]
    chosen = logprobs.gather(1, index)
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    most = min(max(top_k), logits.shape[1])
    tops: list[list[tuple[int, float]]] = [[] for _ in token_ids]
    if most > 0:
        values, ids = logprobs.topk(most, dim=-1)
        tops = [
            sorted(zip(row_ids, row_values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]
    return [
        TokenLogprobs(
            token_ids[row],
            logprob,
            rank,
            tuple(tops[row][: top_k[row]]),
            _named(logprobs[row], named[row] if named else ()),
        )
        for row, (logprob, rank) in enumerate(zip(chosen[:, 0].tolist(), ranks.tolist(), strict=True))
    ]


def _named(logprobs: Tensor, token_ids: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    if not token_ids:
        return ()
    found = logprobs[tensor_on(logprobs.device, token_ids)].tolist()
    return tuple(zip(token_ids, found, strict=True))
