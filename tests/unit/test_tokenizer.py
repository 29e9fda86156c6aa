"""The tokenizer against the library that it stands on, and what it reads beside tokenizer.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import KINDS, byte_level, metaspace, sentence_piece, word_piece

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer
from salver.model.tokenizer.decoding import byte_level_alphabet

TOKENIZERS = {name: Tokenizer(build()) for name, build in KINDS.items()}
BACKENDS = {name: build() for name, build in KINDS.items()}


def write(directory: Path, **files: object) -> Path:
    byte_level().save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_level_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))
    backend = byte_level()
    for byte in range(128):
        (token_id,) = backend.encode(chr(byte)).ids
        assert TOKENIZERS["byte_level"].token_bytes(token_id) == bytes([byte])


def test_kinds_are_recognized() -> None:
    kinds = {name: type(tokenizer.decoding).__name__ for name, tokenizer in TOKENIZERS.items()}
    assert kinds == {
        "byte_level": "ByteLevelDecoding",
        "sentence_piece": "SentencePieceDecoding",
        "metaspace": "SentencePieceDecoding",
        "word_piece": "NoneType",
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(deadline=None)
@given(data=st.data())
def test_decode_is_the_librarys(kind: str, data: st.DataObject) -> None:
    tokenizer, backend = TOKENIZERS[kind], BACKENDS[kind]
    # One id past the vocabulary too: a model may have more rows than its tokenizer has tokens.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12))
    for skip in (False, True):
        expected = backend.decode(ids, skip_special_tokens=skip)
        if kind == "sentence_piece" and "�" in expected:
            continue  # the library gives up a whole run of bytes where one is wrong
        assert tokenizer.decode(ids, skip) == expected


@settings(deadline=None)
@given(text=st.text())
def test_byte_level_text_returns(text: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_bytes_of_tokens() -> None:
    tokenizer = Tokenizer(sentence_piece())
    (_, euro_1, euro_2, euro_3) = tokenizer.encode("€")
    assert [tokenizer.token_bytes(i) for i in (euro_1, euro_2, euro_3)] == [b"\xe2", b"\x82", b"\xac"]
    assert tokenizer.token_bytes(tokenizer.encode(" t")[-1]) == b" t"
    assert tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.token_bytes(10**9) == b"" and tokenizer.token_bytes(-1) == b""
    pieces = Tokenizer(metaspace())
    assert pieces.token_bytes(pieces.encode("the")[0]) == b" the"
    words = Tokenizer(word_piece())
    assert words.token_bytes(words.encode("cats")[1]) == b"##s"


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = Tokenizer(sentence_piece())
    ids = tokenizer.encode("is the")
    assert tokenizer.decode(ids) == "is the"
    assert tokenizer.decode(ids, continuation=True) == " is the"


def test_broken_byte_runs_lose_only_what_is_broken() -> None:
    tokenizer = Tokenizer(sentence_piece())
    euro = tokenizer.encode("€")[1:]
    assert tokenizer.decode([*euro, *euro[:2]]) == "€�"


def test_offsets_are_code_points() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    text = "é the 👍in"
    for token_id, start, end in tokenizer.encode_with_offsets(text):
        # Every byte of a token is of a character that its offsets cover.
        assert tokenizer.token_bytes(token_id) in text[start:end].encode()
    assert tokenizer.encode_with_offsets(text)[-1][1:] == (len(text) - 2, len(text))


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_directory(tmp_path).encode("x" * 100)) == 100


def test_special_ids(tmp_path: Path) -> None:
    bos, eos = byte_level().token_to_id("<s>"), byte_level().token_to_id("</s>")
    tokenizer = Tokenizer.from_directory(
        write(
            tmp_path,
            tokenizer_config={"bos_token": {"content": "<s>", "special": True}, "eos_token": "<s>"},
            config={"eos_token_id": 5},
            generation_config={"eos_token_id": [eos, 7]},
        )
    )
    assert tokenizer.bos_token_id == bos
    assert tokenizer.eos_token_ids == (eos, 7)
    assert tokenizer.special_token_ids == {bos, eos}
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (5,)
    (tmp_path / "config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (bos,)


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write(tmp_path, generation_config={"eos_token_id": "two"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'two'"):
        Tokenizer.from_directory(tmp_path)


def test_the_front_reads_it_without_torch() -> None:
    code = (
        "import sys, salver.model.tokenizer, salver.model.chat_template, salver.model.checkpoint,"
        " salver.server.catalog; print({'torch', 'numpy', 'gguf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
