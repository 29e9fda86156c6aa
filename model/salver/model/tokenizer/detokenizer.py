"""Token by token to text, in whole characters."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_REPLACEMENT = "�"


class Detokenizer:
    """The text of a growing sequence of ids, each character given out once it is certain.

    The joined results of `add` and a last `flush` equal `tokenizer.decode(ids)` with the same
    options. With `continuation` the ids carry on an earlier text (the prompt), so that the space
    with which a SentencePiece tokenizer's text starts is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoding = tokenizer.decoding
        self._at_start = not continuation
        self._strip = 0 if continuation or self._decoding is None else self._decoding.strip
        self._ids: list[int] = []  # of a decoder that needs the whole sequence
        self._given = ""

    def add(self, token_id: int) -> str:
        """Append a token; return the text that became certain, often empty, never half a character."""
        if token_id in self._skipped:
            return ""
        if self._decoding is None:
            self._ids.append(token_id)
            return self._grow(final=False)
        if self._at_start and self._decoding.drops_first:
            token = self._tokenizer.token(token_id)
            if token is None:
                return ""
            self._at_start = False
            return self._utf8.decode(self._decoding.first_token_bytes(token))
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """The rest of the text, an incomplete character as U+FFFD. The detokenizer is at its end then."""
        if self._decoding is None:
            return self._grow(final=True)
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """`text` without those of the text's leading spaces that are still to be removed."""
        if not self._strip or not text:
            return text
        kept = text.lstrip(" ")
        removed = min(self._strip, len(text) - len(kept))
        # Once anything but a space was seen, the start of the text is over.
        self._strip = 0 if kept or removed == self._strip else self._strip - removed
        return text[removed:]

    def _grow(self, *, final: bool) -> str:
        """Decode all ids anew and return what was added, such decoders being of short outputs.

        A trailing U+FFFD may be half a character, so it waits. Where the decoder changed what was
        given out already, nothing more is until the text extends it again.
        """
        text = self._tokenizer.backend_decode(self._ids, self._skip_special_tokens)
        if not final:
            text = text.rstrip(_REPLACEMENT)
        if not text.startswith(self._given):
            return ""
        added = text[len(self._given) :]
        self._given = text
        return added
