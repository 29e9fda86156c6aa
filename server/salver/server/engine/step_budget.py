"""How many tokens a step takes. Standard library only.

While sequences decode, each prompt token in their step delays them. So as long as few
sequences are on their way to their first token (one, or half as many as decode), a step has at
most STRETCH times the tokens that it would take without prompts; otherwise, and while nothing
decodes, the whole budget is used: a crowd that starts together is better served by that. Those of
it that decode already don't count, or its last ones would wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from salver.server.engine.sequence import Sequence

# Three times the tokens take less than twice the time: attention to long contexts and what a step
# costs anyhow don't grow with them (docs/performance.md, "How cost grows").
STRETCH = 3
TOGETHER = 1.0  # seconds between the arrivals of a crowd


@dataclass(frozen=True, slots=True)
class StepBudget:
    """`tokens_for_one` is how many tokens a step computes in about the time of one; 0: prompts have the
    whole budget also while others decode."""

    max_num_batched_tokens: int
    tokens_for_one: int = 0

    def tokens(self, running: Iterable[Sequence], num_waiting: int, arrival: float) -> int:
        """Tokens of the next step, at least one for each running sequence, where so many wait that will
        find a free seat; `arrival` is of the next of them."""
        left = [(s.num_tokens - s.num_computed_tokens, s.arrival) for s in running]
        decoding = [came for num_tokens, came in left if num_tokens == 1]
        starting = [came for num_tokens, came in left if num_tokens > 1] + [arrival] * num_waiting
        if not self.tokens_for_one or not decoding or _is_crowd(starting, decoding):
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, STRETCH * max(self.tokens_for_one, len(decoding)))


def _is_crowd(starting: list[float], decoding: list[float]) -> bool:
    """Whether those on their way to a first token are many beside those that they disturb; by arrivals."""
    if len(starting) <= 1:
        return False
    before = max(starting) - TOGETHER
    return len(starting) > max(1, sum(came < before for came in decoding) // 2)
