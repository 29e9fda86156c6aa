"""Encoders' SentencePiece models without tokenizer.json, against transformers' own conversion of them."""

from __future__ import annotations

import importlib
import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer
from salver.model.tokenizer.sentencepiece import BPE, CONTROL, SPACE, UNIGRAM, model_class

# Class, converter, file, control pieces in front, the model_type of config.json.
FAIRSEQ = ["<unk>", "<s>", "</s>"]
KINDS = {
    "albert": (
        "AlbertTokenizer", "AlbertConverter", "spiece.model", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"],
    ),
    "xlm-roberta": ("XLMRobertaTokenizer", "XLMRobertaConverter", "sentencepiece.bpe.model", FAIRSEQ),
    "camembert": ("CamembertTokenizer", "CamembertConverter", "sentencepiece.bpe.model", FAIRSEQ),
    "deberta-v2": (
        "DebertaV2Tokenizer", "DebertaV2Converter", "spm.model", ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
    ),
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {}, {"do_lower_case": True}, {"do_lower_case": False, "keep_accents": True, "split_by_punct": True},
]  # fmt: skip
UNKNOWN = {"<unk>", "[UNK]"}
WORDS = ("the", "hello", "world", "naive", "cat", "s", "ing", "er", "low", "5,", "12")
TEXTS = [
    "Hello world", "  two  spaces ", "the cats\tlow\nworld", "naïve ``quoted'' 漢字", "12,5, lows!", "", "x",
    "12,5,lows!the'cat",
]  # fmt: skip


def write_model(directory: Path, kind: str, *, model_type: int = UNIGRAM) -> Path:
    model = model_class()()
    file, control = KINDS[kind][2:]
    for piece in control:
        model.pieces.add(piece=piece, type=2 if piece in UNKNOWN else CONTROL, score=0.0)
    words = [*WORDS, *(SPACE + word for word in WORDS)]
    letters = [*string.ascii_letters, *string.digits, SPACE, ",", "!", '"', "`", "'", "ï"]
    for place, piece in enumerate([*words, *letters]):
        model.pieces.add(piece=piece, type=1, score=-1.0 - place / 4)
    model.trainer_spec.model_type = model_type
    model.trainer_spec.unk_id = next(i for i, piece in enumerate(control) if piece in UNKNOWN)
    (directory / file).write_bytes(model.SerializeToString())
    return directory / file


def converted(file: Path, kind: str, ours: Tokenizer, settings: dict[str, Any]) -> Any:
    """As transformers converts it, given the ids of the special tokens."""
    converters = importlib.import_module("transformers.convert_slow_tokenizer")
    usual = {"do_lower_case": kind == "albert", "keep_accents": False, "split_by_punct": False}
    slow = SimpleNamespace(
        **{**usual, **settings}, vocab_file=str(file), convert_tokens_to_ids=ours.token_to_id, legacy=True,
        add_prefix_space=True,
    )  # fmt: skip
    return getattr(converters, KINDS[kind][1])(slow).converted()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_as_transformers_converts_it(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    file = write_model(tmp_path, kind)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": KINDS[kind][0], **settings})
    )
    ours = Tokenizer.from_directory(tmp_path)
    theirs = converted(file, kind, ours, settings)
    # A space at the end, or before a mark that is split off, is a token there; SentencePiece takes it away.
    texts = [text for text in TEXTS if " " not in text] if "split_by_punct" in settings else TEXTS
    for text in map(str.strip, texts):
        for pair in (None, "low" if "split_by_punct" in settings else "the cat"):
            found, wanted = ours.encode_input(text, pair), theirs.encode(text, pair)
            assert list(found.token_ids) == wanted.ids
            assert list(found.segments) == wanted.type_ids
    assert kind == "albert" or ours.mask_token_id == ours.vocab_size - 1


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_those_of_the_words(tmp_path: Path, kind: str) -> None:
    """In code points; without the space before a word. What a label's span is cut by."""
    write_model(tmp_path, kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))  # says the class too
    tokenizer = Tokenizer.from_directory(tmp_path)
    mask = tokenizer.token(tokenizer.mask_token_id or 0)
    text = f"hello  naïve 😀 cats {mask} low"
    found = tokenizer.encode_input(text)
    pieces = [
        text[slice(*span)] for span, of in zip(found.offsets, found.texts, strict=True) if of is not None
    ]
    assert all(piece == piece.strip() for piece in pieces if piece.strip() != mask)
    covered = {place for span in found.offsets for place in range(*span)}
    assert covered >= {place for place, character in enumerate(text) if character != " "}
    for word in ("hello", "low", str(mask)):
        place = text.index(word)
        ends = [end for start, end in found.offsets if start == place or text[start:end].strip() == word]
        assert place + len(word) in ends
    assert tokenizer.mask_token_id in found.token_ids
    assert found.words[1] != found.words[-2]


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "albert", model_type=BPE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "AlbertTokenizer"}))
    with pytest.raises(CheckpointError, match="only a unigram model"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLNetTokenizer"}))
    with pytest.raises(CheckpointError, match="tokenizer_class 'XLNetTokenizer'"):
        Tokenizer.from_directory(tmp_path)
