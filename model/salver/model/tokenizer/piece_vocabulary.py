"""Tokenizers whose pieces come of SentencePiece models and whose ids stand in a vocab.json: Marian, M2M-100.

Marian has a model for each side (source.spm, target.spm), M2M-100 one for both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from ..errors import CheckpointError
from . import languages
from .encoding import EncodedText
from .sentencepiece import SPACE, read_sentencepiece

LANGUAGE_BEGIN, LANGUAGE_END = ">>", "<<"  # around Marian's target languages, which a text may begin with
CLASSES = {
    "MarianTokenizer": ("source.spm", "target.spm"),
    "M2M100Tokenizer": ("sentencepiece.bpe.model",) * 2,
}


@dataclass(frozen=True)
class PieceVocabulary:
    """How the two sides split their texts, and the ids of pieces, which both share."""

    vocabulary: dict[str, int]
    source: tokenizers.Tokenizer
    target: tokenizers.Tokenizer
    begin: tuple[int, ...]  # special tokens around a source
    end: tuple[int, ...]
    unknown: int

    def encode(self, text: str, *, special: bool, output: bool = False) -> list[tuple[int, int, int]]:
        """(id, start, end) of each token, in code points; of a text that is read, or of an `output`."""
        found: list[tuple[int, int, int]] = []
        first = 0
        if not output and text.startswith(LANGUAGE_BEGIN) and LANGUAGE_END in text:
            first = text.index(LANGUAGE_END) + len(LANGUAGE_END)
            found.append((self.vocabulary.get(text[:first], self.unknown), 0, first))
        splitter = self.target if output else self.source
        (encoding,) = splitter.encode_batch([text[first:]], add_special_tokens=False)
        for piece, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            found.append((self.vocabulary.get(piece, self.unknown), first + start, first + end))
        if special:
            end = len(text)
            found = [*((i, 0, 0) for i in self.begin), *found, *((i, end, end) for i in self.end)]
        return found

    def encode_input(self, text: str, *, output: bool = False) -> EncodedText:
        """A text that is read, with its special tokens; or an `output`, without."""
        tokens = EncodedText.of_spans(self.encode(text, special=False, output=output))
        return tokens if output else tokens.around(self.begin, self.end)

    def backend(self, special: list[str]) -> tokenizers.Tokenizer:
        """From ids to text, for a `Tokenizer`."""
        backend = tokenizers.Tokenizer(models.WordLevel(self.vocabulary, unk_token="<unk>"))
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        return backend


def read_piece_vocabulary(
    path: Path, settings: dict[str, Any], special: dict[str, Any]
) -> tuple[PieceVocabulary, tokenizers.Tokenizer] | None:
    """Of a directory; None where its tokenizer is of another kind. And what leads ids back to text.

    `settings` is its tokenizer_config.json, `special` its special_tokens_map.json. Raises CheckpointError.
    """
    name = str(settings.get("tokenizer_class") or "")
    if not name and (path / "source.spm").is_file():
        name = "MarianTokenizer"
    files = CLASSES.get(name)
    if files is None or not (path / "vocab.json").is_file():
        return None
    if settings.get("separate_vocabs"):
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: separate_vocabs is not implemented")
    vocabulary = _read_vocabulary(path / "vocab.json")
    named = {**special, **settings}
    marks = [
        _spelled(named.get(key), usual) for key, usual in (("unk_token", "<unk>"), ("eos_token", "</s>"))
    ]
    marks.append(_spelled(named.get("pad_token"), "<pad>"))
    if name == "M2M100Tokenizer":
        marks.append(_spelled(named.get("bos_token"), "<s>"))
        usual = [f"__{code}__" for code in languages.M2M100]
        for token in named.get("additional_special_tokens") or usual:  # languages, behind the vocabulary
            vocabulary.setdefault(_spelled(token, ""), len(vocabulary))
            marks.append(_spelled(token, ""))
    else:
        marks += [piece for piece in vocabulary if piece.startswith(LANGUAGE_BEGIN)]
    missing = [mark for mark in marks[:2] if mark not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{path / 'vocab.json'}: the special token {missing[0]} is not in the vocabulary"
        )
    begin: tuple[int, ...] = ()
    if name == "M2M100Tokenizer":
        language = f"__{settings.get('src_lang') or 'en'}__"
        if language not in vocabulary:
            raise CheckpointError(
                f"{path / 'special_tokens_map.json'}: additional_special_tokens do not have {language}"
            )
        begin = (vocabulary[language],)
    source, target = (read_sentencepiece(path / file) for file in files)
    found = PieceVocabulary(
        vocabulary, source, target, begin, (vocabulary[marks[1]],), vocabulary[marks[0]]
    )  # fmt: skip
    return found, found.backend(marks)


def _read_vocabulary(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise CheckpointError(f"{file}: pieces with their ids were expected")
    return found


def _spelled(value: object, usual: str) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else usual
