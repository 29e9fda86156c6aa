"""The head of a decoder that classifies, as data. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """A row of scores, one for each label, of hidden states after the last norm.

    Attributes:
        reads: "input" (of its last token, which has seen all others) or "tokens" (of each).
        problem_type: as config.json says; empty where it says nothing.
        rank_activation: of a single score, for ranking: identity, sigmoid; empty: sigmoid.
        padding_id: an input's last token is the last one that is not this; None: the last one.
    """

    reads: str
    labels: tuple[str, ...]
    problem_type: str
    bias: bool
    padding_id: int | None
    rank_activation: str = ""

    def place(self, token_ids: tuple[int, ...] | list[int]) -> int:
        """Of the token that an input's scores are read of."""
        last = len(token_ids) - 1
        if self.padding_id is None:
            return last
        return next((i for i in range(last, -1, -1) if token_ids[i] != self.padding_id), 0)
