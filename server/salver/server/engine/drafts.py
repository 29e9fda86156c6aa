"""Guesses at a sequence's next tokens, and how many of them a step should check.

Standard library only. A guess costs a row of the step and changes no token: the model samples
every position with that position's own noise, and a draft is kept only where it is the token
that was sampled anyway. So everything here is about speed alone.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Protocol

from salver.server.engine.sequence import Sequence

NUM_CLASSES = 3  # of guesses, by how much speaks for them; each has its own rate of acceptance
MATCH = 3  # tokens that must agree before a continuation is believed
LONG_MATCHES = (5, 12)  # from here on, a match belongs to the next class
CANDIDATES = 8  # earlier places that are compared for the longest match
FIRST_RATE = 0.6  # the rate of acceptance that a class has before anything is known
LEARNING = 0.15  # weight of a new observation in a sequence's rate; in the common one, a tenth of it
FORGETTING = 0.01  # a step without a try brings a rate so much closer to FIRST_RATE
MARGIN = 1.03  # the gain that must be expected: rates and costs are estimates


@dataclass(frozen=True, slots=True)
class Offer:
    """So many drafts can be had, of this class."""

    num_drafts: int
    class_index: int = 0


class Drafter(Protocol):
    """Where drafts come from."""

    def offer(self, sequence: Sequence, most: int) -> Offer:
        """How many tokens it can propose to follow the sequence's newest; cheap."""
        ...

    def propose(self, wanted: Values[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """At most so many tokens for each of these, as `offer` said just before."""
        ...

    def seconds(self, num_sequences: int) -> float:
        """What one more token for each of so many sequences costs."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence; it may come again."""
        ...


class _Lookup:
    """The places of every `MATCH` tokens of a sequence; each token is looked at once."""

    __slots__ = ("_earlier", "_latest", "_num_indexed", "found")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}  # the position after the latest occurrence
        self._earlier = array("i", [0] * MATCH)  # by that position: the one before it, or 0
        self._num_indexed = MATCH - 1
        self.found = 0  # where the continuation begins; 0: nowhere

    def find(self, token_ids: list[int]) -> int:
        """Looks for the longest match of the end of `token_ids`; its length (0: none)."""
        latest, earlier = self._latest, self._earlier
        # All but the newest position, which would find itself.
        for position in range(self._num_indexed + 1, len(token_ids)):
            key = tuple(token_ids[position - MATCH : position])
            earlier.append(latest.get(key, 0))
            latest[key] = position
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        self.found, best = 0, 0
        place = latest.get(tuple(token_ids[-MATCH:]), 0)
        for _ in range(CANDIDATES):
            if not place:
                break
            length = _common_end(token_ids, place)
            if length > best:
                self.found, best = place, length
            if best >= LONG_MATCHES[-1]:
                break
            place = earlier[place]
        return best


def _common_end(token_ids: list[int], place: int) -> int:
    """How many tokens before `place` are those at the end; no more than matter."""
    end = len(token_ids)
    length = MATCH
    while (
        length < min(place, LONG_MATCHES[-1]) and token_ids[place - 1 - length] == token_ids[end - 1 - length]
    ):
        length += 1
    return length


class PromptLookup:
    """Proposes what followed when the sequence's last tokens stood earlier in it (n-gram, prompt lookup).

    Saxena 2023, "Prompt Lookup Decoding". A step costs a few dictionary look-ups, however long the
    sequence is. Long matches are more often right than short ones, so they are classes of their own.
    """

    def __init__(self) -> None:
        self._lookups: dict[Sequence, _Lookup] = {}

    def offer(self, sequence: Sequence, most: int) -> Offer:
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = _Lookup()
        length = lookup.find(sequence.token_ids)
        return Offer(most if length else 0, bisect_right(LONG_MATCHES, length))

    def propose(self, wanted: Values[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        drafts = []
        for sequence, count in wanted:
            token_ids, found = sequence.token_ids, self._lookups[sequence].found
            # A continuation that reaches the end goes on from its own beginning: a loop is a loop.
            period = len(token_ids) - found
            drafts.append(tuple(token_ids[found + i % period] for i in range(count)))
        return drafts

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        self._lookups.pop(sequence, None)


class StepCosts:
    """Seconds of a step by its rows: measured at a few numbers, linear between and beyond them."""

    def __init__(self, points: Values[tuple[int, float]]) -> None:
        """Raises ValueError for no points. Times that fall with the rows are noise: they are raised."""
        if not points:
            raise ValueError("no measured steps")
        self._rows: list[int] = []
        self._seconds: list[float] = []
        for rows, seconds in sorted(points):
            self._rows.append(rows)
            self._seconds.append(max([seconds, *self._seconds[-1:]]))

    def seconds(self, rows: int) -> float:
        """What a step of so many rows takes."""
        if len(self._rows) == 1:
            return self._seconds[0] * max(1.0, rows / self._rows[0])
        right = min(max(1, bisect_right(self._rows, rows)), len(self._rows) - 1)
        x0, x1 = self._rows[right - 1 : right + 1]
        y0, y1 = self._seconds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (max(rows, self._rows[0]) - x0) / (x1 - x0)


class Speculation:
    """Decides how many drafts each sequence gets in a step: those that promise more tokens a second.

    The rule is that of goodput (Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large
    Language Models Using Goodput"): draft j of a sequence whose drafts are accepted at rate p is
    worth p**j tokens, and the step takes as long as its rows. The best drafts of all sequences come
    first, as many as make the expected tokens over the expected seconds the most; none, where the
    rows are dear (a full batch) or the guesses bad.
    """

    def __init__(self, drafter: Drafter, costs: StepCosts, *, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.num_drafts = 0  # drafts checked
        self.num_accepted = 0  # and found right
        self._drafter = drafter
        self._costs = costs
        self._common = [FIRST_RATE] * NUM_CLASSES
        self._rates: dict[Sequence, list[float]] = {}
        self._classes: dict[Sequence, int] = {}  # of the drafts that are being checked

    def drafts(
        self, rooms: Values[tuple[Sequence, int]], num_rows: int, budget: int
    ) -> list[tuple[int, ...]]:
        """The drafts of each of these, which sample in a step of `num_rows` rows.

        None gets more than its room says, all together no more than the budget.
        """
        offers = [
            self._drafter.offer(sequence, min(room, self.max_drafts)) if room > 0 else Offer(0)
            for sequence, room in rooms
        ]
        counts = self._counts(rooms, offers, num_rows, budget)
        wanted = []
        for (sequence, _), offer, count in zip(rooms, offers, counts, strict=True):
            self._classes[sequence] = offer.class_index
            if count:
                wanted.append((sequence, count))
            elif offer.num_drafts:
                rates = self._rates_of(sequence)
                rates[offer.class_index] += FORGETTING * (FIRST_RATE - rates[offer.class_index])
        proposed = iter(self._drafter.propose(wanted) if wanted else [])
        return [next(proposed) if count else () for count in counts]

    def checked(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Learns from a step in which so many drafts of the sequence were right."""
        self.num_drafts += num_drafts
        self.num_accepted += num_accepted
        index = self._classes[sequence]
        rates = self._rates_of(sequence)
        # Those behind the first wrong one say nothing.
        for right in [1.0] * num_accepted + [0.0] * (num_accepted < num_drafts):
            rates[index] += LEARNING * (right - rates[index])
            self._common[index] += LEARNING / 10 * (right - self._common[index])

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended, or lost its blocks."""
        self._rates.pop(sequence, None)
        self._classes.pop(sequence, None)
        self._drafter.forget(sequence)

    def _rates_of(self, sequence: Sequence) -> list[float]:
        rates = self._rates.get(sequence)
        if rates is None:
            rates = self._rates[sequence] = list(self._common)
        return rates

    def _counts(
        self, rooms: Values[tuple[Sequence, int]], offers: list[Offer], num_rows: int, budget: int
    ) -> list[int]:
        counts = [0] * len(rooms)
        chances: list[tuple[float, int, int]] = []  # (less the chance, depth, whose)
        for whose, ((sequence, _), offer) in enumerate(zip(rooms, offers, strict=True)):
            if offer.num_drafts:
                rate = self._rates_of(sequence)[offer.class_index]
                chances += [(-(rate**depth), depth, whose) for depth in range(1, offer.num_drafts + 1)]
        chances.sort()
        expected, deepest, taken = float(len(rooms)), 0, 0
        best = MARGIN * expected / self._costs.seconds(num_rows)
        level = self._drafter.seconds(len(rooms))
        for number, (chance, depth, _) in enumerate(chances[: max(0, budget)], 1):
            expected -= chance
            deepest = max(deepest, depth)
            pace = expected / (self._costs.seconds(num_rows + number) + deepest * level)
            if pace > best:
                best, taken = pace, number
        for _, _, whose in chances[:taken]:
            counts[whose] += 1
        return counts
