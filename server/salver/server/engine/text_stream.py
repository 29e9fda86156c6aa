"""One sample's tokens turned into text, as far as the text is certain.

Text is certain when the detokenizer knows its characters and when no part of it can
still become part of a stop string. It depends on the sequence of tokens alone, not on
how they were grouped into outputs, so a stream that was cut goes on elsewhere by
replaying the tokens: what a first server has sent is what the replay gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salver.model.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What ended a sample: exactly one of a stop string, a stop token id, an end-of-sequence token."""

    text: str | None = None
    token_id: int | None = None
    eos: bool = False


class StopStrings:
    """The stop strings of a request, prepared once for all its samples."""

    __slots__ = ("longest", "prefixes", "strings")

    def __init__(self, strings: tuple[str, ...]) -> None:
        """Raises ValueError for an empty stop string, which would end everything at once."""
        if "" in strings:
            raise ValueError("a stop string must not be empty")
        self.strings = strings
        # Proper prefixes: a text ending in one may still become a match.
        self.prefixes = frozenset(s[:k] for s in strings for k in range(1, len(s)))
        self.longest = max(map(len, self.prefixes), default=0)

    def find(self, text: str, old: int) -> tuple[int, int] | None:
        """(start, end) of the match that is complete first, among those that end beyond `old`.

        Of two that end together the longer one. None if there is none.
        """
        best: tuple[int, int] | None = None
        for string in self.strings:
            start = text.find(string, max(0, old - len(string) + 1))
            if start >= 0:
                end = start + len(string)
                if best is None or (end, start) < (best[1], best[0]):
                    best = (start, end)
        return best

    def uncertain(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        for length in range(min(self.longest, len(text)), 0, -1):
            if text[-length:] in self.prefixes:
                return length
        return 0


class TextStream:
    """Text of one sample, token by token. `match` is set once something ended it."""

    __slots__ = (
        "_detokenizer",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_stop",
        "_tokenizer",
        "length",
        "match",
        "num_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        detokenizer: Detokenizer,
        stop: StopStrings,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """`detokenizer` is fresh, skips special tokens and belongs to this stream from now on."""
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""
        self.length = 0  # of the text given out so far, in code points
        self.num_tokens = 0
        self.match: StopMatch | None = None

    def add(self, token_id: int) -> str:
        """Takes a token that is not a stop token; the text that became certain.

        A stop string that it completes sets `match` and ends the text, unless fewer than
        min_tokens tokens were taken: then it is text like any other.
        """
        self.num_tokens += 1
        piece = self._detokenizer.add(token_id)
        if not self._stop.strings:
            self.length += len(piece)
            return piece
        if not piece:
            return ""
        text = self._held + piece
        if self.num_tokens >= self._min_tokens:
            found = self._stop.find(text, len(self._held))
            if found is not None:
                start, end = found
                self.match = StopMatch(text=text[start:end])
                self._held = ""
                return self._give(text[: end if self._include_stop else start])
        certain = len(text) - self._stop.uncertain(text)
        self._held = text[certain:]
        return self._give(text[:certain])

    def finish(self) -> str:
        """Ends the text for want of more tokens: what was held back, and incomplete characters as U+FFFD."""
        text = self._held + self._detokenizer.flush()
        self._held = ""
        return self._give(text)

    def finish_with_stop_token(self, token_id: int, *, eos: bool) -> str:
        """Takes the stop token that ended the sample; its own text is text only with include_stop."""
        self.num_tokens += 1
        self.match = StopMatch(eos=True) if eos else StopMatch(token_id=token_id)
        if not self._include_stop:
            return self.finish()
        if token_id in self._tokenizer.special_token_ids:  # the detokenizer would skip it
            text = self._tokenizer.decode([token_id], skip_special_tokens=False, continuation=True)
            return self.finish() + self._give(text)
        self._held += self._detokenizer.add(token_id)
        return self.finish()

    def _give(self, text: str) -> str:
        self.length += len(text)
        return text
