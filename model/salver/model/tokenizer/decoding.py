"""What a token id stands for in bytes, from the `decoder` of a tokenizer.json.

Two kinds cover nearly every generating checkpoint: ByteLevel (GPT-2's alphabet of 256 printable
characters) and the SentencePiece style (a marker for the space, `<0xE2>` for single bytes). Text
is then the UTF-8 of the tokens' bytes one after the other, and can be told token by token. Any
other decoder (WordPiece, CTC, BPE suffixes ...) looks at neighbours and has no such table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class ByteLevelDecoding:
    """Each character of a token is a byte; a token with a character outside the alphabet is plain text."""

    drops_first: bool = False  # what SentencePiece style decoders may do at the start of a text
    strip: int = 0

    def token_bytes(self, token: str) -> bytes:
        """The bytes that `token` (as the vocabulary spells it) stands for."""
        try:
            return bytes([_ALPHABET[character] for character in token])
        except KeyError:
            return token.encode()

    def first_token_bytes(self, token: str) -> bytes:
        """The bytes of `token` where it begins a text."""
        return self.token_bytes(token)


@dataclass(frozen=True, slots=True)
class SentencePieceDecoding:
    """`marker` stands for a space, and with `byte_fallback` a token `<0xE2>` for that byte.

    At the start of a text, `drops_first` leaves every marker of the first token out (the Metaspace
    decoder), and `strip` is the number of leading spaces that are removed (the Strip decoder).
    """

    marker: str
    byte_fallback: bool
    drops_first: bool = False
    strip: int = 0

    def token_bytes(self, token: str) -> bytes:
        """The bytes that `token` (as the vocabulary spells it) stands for inside a text."""
        return self._bytes(token, " ")

    def first_token_bytes(self, token: str) -> bytes:
        """The bytes of `token` where it begins a text; `strip` is left to who has the whole text."""
        return self._bytes(token, "" if self.drops_first else " ")

    def _bytes(self, token: str, space: str) -> bytes:
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(self.marker, space).encode()


Decoding = ByteLevelDecoding | SentencePieceDecoding


def read_decoding(decoder: Mapping[str, Any] | None) -> Decoding | None:
    """The decoding that `decoder` (of a tokenizer.json) describes; None where tokens have no bytes."""
    if decoder is None:
        return None
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return None
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return ByteLevelDecoding()
    return _sentence_piece(steps)


def _sentence_piece(steps: Sequence[Mapping[str, Any]]) -> SentencePieceDecoding | None:
    marker: str | None = None
    byte_fallback = drops_first = fused = False
    strip = 0
    for step in steps:
        match step:
            case {"type": "Metaspace", "replacement": str(replacement)} if marker is None and not fused:
                marker = replacement
                # Older files say add_prefix_space where newer ones say prepend_scheme.
                scheme = step.get("prepend_scheme")
                drops_first = scheme != "never" if scheme else bool(step.get("add_prefix_space", True))
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "} if (
                marker is None and not fused
            ):
                marker = pattern
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strip = start
            case _:
                return None
    if marker is None:
        return None
    return SentencePieceDecoding(marker, byte_fallback, drops_first, strip)
