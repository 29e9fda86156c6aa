"""Two ways to ask better: examples before the question, and the answer that most samples agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from salver.client.types import GenerateResult, Message

Answer = TypeVar("Answer")


def few_shot(examples: Iterable[tuple[str, str]], question: str, *, system: str = "") -> list[Message]:
    """A conversation in which each example was asked and answered before the question (Brown et al. 2020)."""
    messages = [Message.system(system)] if system else []
    for asked, answered in examples:
        messages += [Message.user(asked), Message.assistant(answered)]
    return [*messages, Message.user(question)]


@dataclass(frozen=True, slots=True)
class Vote(Generic[Answer]):
    """The answer of most samples, the first of equals; `votes` counts every answer, most first.

    `unread` samples said nothing that could be read.
    """

    answer: Answer
    votes: dict[Answer, int]
    unread: int

    @property
    def share(self) -> float:
        """Of all samples, those that agree."""
        return self.votes[self.answer] / (sum(self.votes.values()) + self.unread)


def self_consistent(result: GenerateResult, read: Callable[[str], Answer | None]) -> Vote[Answer]:
    """The answer that most of the n samples of `result` come to (Wang et al. 2022, self-consistency).

    `read` finds the answer in a sample's text; None, or a ValueError, where there is none. Answers
    are hashable. Raises ValueError when no sample has one.
    """
    votes: Counter[Answer] = Counter()
    unread = 0
    for completion in result.completions:
        try:
            answer = read(completion.text)
        except ValueError:
            answer = None
        if answer is None:
            unread += 1
        else:
            votes[answer] += 1
    if not votes:
        raise ValueError(f"none of {unread} samples has an answer")
    ranked = dict(votes.most_common())
    return Vote(next(iter(ranked)), ranked, unread)
