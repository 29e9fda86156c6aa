"""Translation models and summarizers without tokenizer.json, as transformers' classes read them."""

from __future__ import annotations

import importlib
import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer
from salver.model.tokenizer.sentencepiece import BPE, CONTROL, SPACE, UNIGRAM, UNKNOWN, model_class

FAIRSEQ, GOOGLE = ("<unk>", "<s>", "</s>"), ("<pad>", "</s>", "<unk>")
BPE_FILE = "sentencepiece.bpe.model"
WORDS = ("the", "hello", "world", "cat", "ing", "er", "low")
TEXTS = ["Hello world", "the cats lowing", "hello world, the cat", "naïve low!", "漢字 cat", "x"]


def write_model(file: Path, front: tuple[str, ...], kind: int = UNIGRAM) -> None:
    """Of words, of what they begin with, and of letters."""
    model = model_class()()
    for piece in front:
        model.pieces.add(piece=piece, type=UNKNOWN if piece == "<unk>" else CONTROL, score=0.0)
    words = [*WORDS, *(SPACE + word for word in WORDS)]
    parts = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    letters = [*string.ascii_letters, *string.digits, SPACE, ",", ".", "!"]
    for place, piece in enumerate([*parts, *letters]):
        model.pieces.add(piece=piece, type=1, score=-1.0 - place / 4)
    model.trainer_spec.model_type = kind
    model.trainer_spec.unk_id = front.index("<unk>")
    file.write_bytes(model.SerializeToString())


def settle(directory: Path, **settings: Any) -> Tokenizer:
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_directory(directory)


def spelled(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.token(token_id) for token_id in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("name", "file", "front"),
    [
        ("MBart", BPE_FILE, FAIRSEQ),
        ("MBart50", BPE_FILE, FAIRSEQ),
        ("Pegasus", "spiece.model", GOOGLE),
        ("XGLM", BPE_FILE, FAIRSEQ),
    ],
)
def test_as_transformers_converts_it(name: str, file: str, front: tuple[str, ...], tmp_path: Path) -> None:
    write_model(tmp_path / file, front)
    ours = settle(tmp_path, tokenizer_class=f"{name}Tokenizer")
    slow = SimpleNamespace(
        vocab_file=str(tmp_path / file), convert_tokens_to_ids=ours.token_to_id, legacy=True, offset=103,
        pad_token="<pad>", eos_token="</s>", eos_token_id=ours.token_to_id("</s>"), add_prefix_space=True,
        mask_token_sent="<mask_1>", mask_token="<mask_2>", mask_token_id=3,
    )  # fmt: skip
    converters = importlib.import_module("transformers.convert_slow_tokenizer")
    theirs = getattr(converters, f"{name}Converter")(slow).converted()
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        if text.isascii():
            assert ours.decode(ours.encode_output(text)) == theirs.decode(ours.encode_output(text)) == text


def test_languages_stand_where_their_class_puts_them(tmp_path: Path) -> None:
    write_model(tmp_path / BPE_FILE, FAIRSEQ)
    mbart = settle(tmp_path, tokenizer_class="MBartTokenizer", src_lang="de_DE")
    assert spelled(mbart, "the cat") == ["▁the", "▁cat", "</s>", "de_DE"]
    assert len(mbart.languages) == 25 and mbart.mask_token_id == mbart.vocab_size - 1
    assert spelled(mbart, "the <mask> en_XX cat") == ["▁the", "<mask>", "en_XX", "▁cat", "</s>", "de_DE"]
    newer = settle(tmp_path, tokenizer_class="MBart50TokenizerFast", additional_special_tokens=["<mine>"])
    assert spelled(newer, "the cat") == ["en_XX", "▁the", "▁cat", "</s>"]
    assert len(newer.languages) == 52 and newer.token_to_id("<mine>") == newer.vocab_size - 1
    # Nobody says which class: the model does, in config.json.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mbart"}))
    assert spelled(settle(tmp_path), "the") == ["▁the", "</s>", "en_XX"]
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer_class": "MBart50Tokenizer"}))
    assert spelled(settle(tmp_path), "the") == ["en_XX", "▁the", "</s>"]
    with pytest.raises(CheckpointError, match="special token xx_XX is not in the vocabulary"):
        settle(tmp_path, tokenizer_class="MBartTokenizer", src_lang="xx_XX")


def test_nllb(tmp_path: Path) -> None:
    write_model(tmp_path / BPE_FILE, FAIRSEQ, BPE)
    full = settle(tmp_path, tokenizer_class="NllbTokenizer")
    assert spelled(full, "the lowing cat") == ["eng_Latn", "▁the", "▁low", "ing", "▁cat", "</s>"]
    assert (len(full.languages), full.token_to_id("<unk>"), full.token_to_id("<s>")) == (202, 3, 0)
    assert full.languages["ace_Arab"] == full.vocab_size - 203 and full.mask_token_id == full.vocab_size - 1
    listed = ["fra_Latn", "eng_Latn"]
    few = settle(
        tmp_path, tokenizer_class="NllbTokenizer", src_lang="fra_Latn", legacy_behaviour=True,
        additional_special_tokens=[{"content": code} for code in listed],
    )  # fmt: skip
    assert spelled(few, "the") == ["▁the", "</s>", "fra_Latn"] and sorted(few.languages) == sorted(listed)
    assert few.decode(few.encode("the lowing cat")) == "the lowing cat"
    # As a slow tokenizer was saved, which says every id.
    size = few.vocab_size - 3
    says = {str(size + i): {"content": mark} for i, mark in enumerate(("<mask>", "fra_Latn", "eng_Latn"))}
    told = settle(tmp_path, tokenizer_class="NllbTokenizer", added_tokens_decoder=says)
    assert (told.token_to_id("<mask>"), told.languages["eng_Latn"]) == (size, size + 2)
    with pytest.raises(CheckpointError, match="added_tokens_decoder has <s> at 5; by the rules"):
        settle(tmp_path, tokenizer_class="NllbTokenizer", added_tokens_decoder={"5": {"content": "<s>"}})


def test_pegasus_without_marks_of_its_training(tmp_path: Path) -> None:
    write_model(tmp_path / "spiece.model", GOOGLE)
    usual = settle(tmp_path, tokenizer_class="PegasusTokenizer")
    assert [usual.token(i) for i in (0, 1, 2, 3, 4, 104, 105)] == [
        "<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk_102>", "<unk>",
    ]  # fmt: skip
    plain = settle(tmp_path, tokenizer_class="PegasusTokenizer", offset=0, mask_token_sent=None)
    assert [plain.token(i) for i in range(3)] == list(GOOGLE)
    assert spelled(plain, "the") == ["▁the", "</s>"]
    with pytest.raises(CheckpointError, match="offset is 'x'"):
        settle(tmp_path, tokenizer_class="PegasusTokenizer", offset="x")


def test_t5_and_bart_where_only_the_model_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    write_model(tmp_path / "spiece.model", GOOGLE)
    t5 = settle(tmp_path)
    assert spelled(t5, "the cat") == ["▁the", "▁cat", "</s>"]
    assert t5.token(t5.vocab_size - 1) == "<extra_id_0>" and t5.decode(t5.encode("naïve")) == "nave"
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}))
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    symbols = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    assert spelled(settle(tmp_path), "the the") == ["<s>", "the", "Ġthe", "</s>"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blenderbot"}))
    blenderbot = settle(tmp_path)
    assert spelled(blenderbot, "the the") == ["Ġthe", "Ġthe", "</s>"]
    assert blenderbot.decode(blenderbot.encode("the the")) == " the the"


def test_m2m100_that_lists_no_languages(tmp_path: Path) -> None:
    write_model(tmp_path / BPE_FILE, FAIRSEQ)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁cat"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    found = settle(tmp_path)
    assert spelled(found, "the cat") == ["__en__", "▁the", "▁cat", "</s>"]
    assert (len(found.languages), found.languages["af"]) == (100, len(pieces))
