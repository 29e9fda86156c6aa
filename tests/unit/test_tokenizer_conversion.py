"""Checkpoints without tokenizer.json: SentencePiece models, vocab.json with merges.txt."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer
from salver.model.tokenizer.sentencepiece import BPE, CONTROL, SPACE, UNIGRAM, USER_DEFINED, model_class

TEXTS = [
    "Hello world", "  two  spaces ", "the quick brown fox; the\nlazy dog", "", " ",
    "caf\u00e9 \u2603 \U0001f600", "hello<mark>world", "a\tb", f"{SPACE}marked", "lowlowlow <mark> low",
]  # fmt: skip
WORDS = ("the", "hello", "world", "quick", "brown", "fox", "low", "lo", "he", "ll", "wo", "rl", "in", "er")


def write_model(path: Path, kind: int, *, dummy_prefix: bool = True, byte_fallback: bool = True) -> Any:
    """A SentencePiece model of letters, some words, and a user-defined piece."""
    model = model_class()()
    pieces = [("<unk>", 2, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0), ("<mark>", USER_DEFINED, 0.0)]
    pieces += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)] if byte_fallback else []
    words = [
        *dict.fromkeys(part for word in WORDS for end in range(2, len(word) + 1) for part in (word[:end],))
    ]
    words += [SPACE + word for word in words]
    pieces += [(word, 1, -float(i)) for i, word in enumerate(sorted(words, key=len))]
    letters = string.ascii_letters + string.digits + SPACE + ";.,"
    pieces += [(letter, 1, -1000.0 - i) for i, letter in enumerate(letters)]
    pieces += [(SPACE + letter, 1, -500.0 - i) for i, letter in enumerate(string.ascii_lowercase)]
    for piece, of_kind, score in pieces:
        model.pieces.add(piece=piece, type=of_kind, score=score)
    model.trainer_spec.model_type = kind
    model.trainer_spec.byte_fallback = byte_fallback
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return model


@pytest.mark.parametrize("kind", [BPE, UNIGRAM])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_as_transformers_reads_it(kind: int, dummy_prefix: bool, byte_fallback: bool, tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import SpmConverter
    from transformers.utils import sentencepiece_model_pb2_new as messages

    write_model(tmp_path / "tokenizer.model", kind, dummy_prefix=dummy_prefix, byte_fallback=byte_fallback)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    ours = Tokenizer.from_directory(tmp_path)
    proto = messages.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    pairs = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary = pairs if kind == UNIGRAM else {piece: i for i, (piece, _) in enumerate(pairs)}
    theirs = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        if byte_fallback:
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.encode("<s>")[-1] == 1  # spelled in the text, as in transformers


def test_known_ids(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tokenizer.model", BPE)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        )
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("hello world")
    spelled = [model.pieces[index].piece for index in ids]
    assert spelled == ["<s>", f"{SPACE}hello", f"{SPACE}world"]
    assert tokenizer.decode(ids) == "hello world"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.decode(tokenizer.encode("\u2603!")) == "\u2603!"  # by bytes


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the quick brown fox", "low lower lowest"] * 20, vocab_size=290)
    trained.save_model(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    ours = Tokenizer.from_directory(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids[0] == ours.bos_token_id == trained.get_vocab_size()  # added behind the vocabulary
        assert ids[1:] == trained.encode(text).ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer_class": "ReformerTokenizer"}, "tokenizer_class 'ReformerTokenizer'"),
        ({"add_eos_token": True}, "add_eos_token"),
    ],
)
def test_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_model(tmp_path / "spiece.model", UNIGRAM)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_directory(tmp_path)


def test_a_damaged_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\xff\xff\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.from_directory(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="without pieces"):
        Tokenizer.from_directory(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        Tokenizer.from_directory(tmp_path)


def test_t5_ends_its_texts_and_has_marks_behind_its_pieces(tmp_path: Path) -> None:
    model = write_model(tmp_path / "spiece.model", UNIGRAM)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids, plain = tokenizer.encode("the fox"), tokenizer.encode("the fox", add_special_tokens=False)
    assert ids == [*plain, tokenizer.token_to_id("</s>")]
    pieces = len(model.pieces)
    assert tokenizer.vocab_size == pieces + 100
    assert [tokenizer.token_to_id(f"<extra_id_{i}>") for i in (99, 0)] == [pieces, pieces + 99]
    assert tokenizer.decode([pieces + 99, *ids]) == "the fox"
