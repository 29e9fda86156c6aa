"""What one step computes: the scheduler's choice, which the runner carries out. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from salver.server.engine.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """Tokens `start : start + num_tokens` of a sequence are computed in this step.

    The last of them can be drafts: guesses at what follows its newest token, checked in this step.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()
    reads_source: bool = False  # before them, the encoder reads all of the sequence's source

    @property
    def num_source_tokens(self) -> int:
        """Of the source, if it is read in this step."""
        return self.sequence.num_source_tokens if self.reads_source else 0

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's newest token, so that the next one can be chosen."""
        reached = self.start + self.num_tokens - len(self.draft)
        return self.sequence.generates and reached == self.sequence.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute, drafts last."""
        return [*self.sequence.token_ids[self.start : self.start + self.num_tokens], *self.draft]


@dataclass(slots=True)
class Schedule:
    """One step: what is computed, the block copies that come before, and who just began."""

    scheduled: list[Scheduled] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens + item.num_source_tokens for item in self.scheduled)
