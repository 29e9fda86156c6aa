"""A text, or a pair, as an encoder reads it: ids with everything that answers are led back to text by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Parallel tuples, one entry for each token."""

    token_ids: tuple[int, ...]
    segments: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]  # in code points of its own text
    texts: tuple[int | None, ...]  # 0 or 1: the text that it comes from; None: a special token
    words: tuple[int | None, ...]  # tokens of one word have one number
    truncated: int = 0  # tokens that were left out

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of_ids(cls, token_ids: Sequence[int]) -> EncodedText:
        """Of token ids that come without a text."""
        count = len(token_ids)
        return cls(tuple(token_ids), (0,) * count, ((0, 0),) * count, (0,) * count, (None,) * count)

    @classmethod
    def of_spans(cls, spans: Sequence[tuple[int, int, int]]) -> EncodedText:
        """Of (id, start, end) of a text's tokens, of a tokenizer that knows no words."""
        offsets = tuple((start, end) for _, start, end in spans)
        return replace(cls.of_ids([token_id for token_id, _, _ in spans]), offsets=offsets)

    def around(self, begin: Sequence[int] = (), end: Sequence[int] = ()) -> EncodedText:
        """Between these special tokens."""
        first, last = len(begin), len(end)
        return EncodedText(
            (*begin, *self.token_ids, *end),
            (*[0] * first, *self.segments, *[0] * last),
            (*[(0, 0)] * first, *self.offsets, *[(0, 0)] * last),
            (*[None] * first, *self.texts, *[None] * last),
            (*[None] * first, *self.words, *[None] * last),
            self.truncated,
        )

    def of_text(self, number: int) -> EncodedText:
        """As another text than the first."""
        return replace(self, texts=tuple(None if text is None else number for text in self.texts))

    def keep(self, places: Sequence[int]) -> EncodedText:
        """Of these tokens only."""
        return EncodedText(
            tuple(self.token_ids[i] for i in places),
            tuple(self.segments[i] for i in places),
            tuple(self.offsets[i] for i in places),
            tuple(self.texts[i] for i in places),
            tuple(self.words[i] for i in places),
            self.truncated,
        )

    def shortened(self, limit: int) -> EncodedText:
        """At most `limit` tokens: the ends of the texts are left out, of the longer one first.

        Special tokens stay. Raises ValueError where they alone are more.
        """
        if len(self) <= limit:
            return self
        places: tuple[list[int], list[int]] = ([], [])
        for place, text in enumerate(self.texts):
            if text is not None:
                places[text].append(place)
        room = limit - (len(self) - len(places[0]) - len(places[1]))
        if room < 1:
            raise ValueError(f"{limit} tokens leave no room for text")
        first, second = _shares(len(places[0]), len(places[1]), room)
        dropped = {*places[0][first:], *places[1][second:]}
        kept = self.keep([place for place in range(len(self)) if place not in dropped])
        return replace(kept, truncated=len(dropped))


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text stay, as tokenizers' "longest first" has it."""
    if second == 0:
        return min(first, room), 0
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def encoded(encoding: Any) -> EncodedText:
    """Of an encoding of the tokenizers library."""
    special = encoding.special_tokens_mask
    return EncodedText(
        tuple(encoding.ids),
        tuple(encoding.type_ids),
        tuple(encoding.offsets),
        tuple(None if skip else text for skip, text in zip(special, encoding.sequence_ids, strict=True)),
        tuple(encoding.word_ids),
    )
