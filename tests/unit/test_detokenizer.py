"""Token by token: the same text as all at once, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import KINDS, byte_level, sentence_piece

from salver.model.tokenizer import Detokenizer, Tokenizer

TOKENIZERS = {name: Tokenizer(build()) for name, build in KINDS.items()}


def pieces(
    tokenizer: Tokenizer, ids: list[int], skip: bool = True, *, continuation: bool = False
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, continuation=continuation)
    return [*map(detokenizer.add, ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(deadline=None)
@given(data=st.data())
def test_the_pieces_make_the_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)
    assert "".join(pieces(tokenizer, ids, skip, continuation=True)) == tokenizer.decode(
        ids, skip, continuation=True
    )


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="�")))
def test_of_whole_text_every_piece_is_whole_characters(text: str) -> None:
    for kind in ("byte_level", "sentence_piece"):
        tokenizer = TOKENIZERS[kind]
        given_out = pieces(tokenizer, tokenizer.encode(text), skip=False)
        assert not any("�" in piece for piece in given_out)
        assert "".join(given_out) == tokenizer.decode(tokenizer.encode(text), False)
        if kind == "byte_level":
            assert "".join(given_out) == text


def test_an_emoji_over_several_tokens_comes_with_its_last() -> None:
    for build in (byte_level, sentence_piece):
        tokenizer = Tokenizer(build())
        ids = tokenizer.encode("a👍b")
        assert len(ids) >= 5
        given_out = [piece for piece in pieces(tokenizer, ids) if piece]
        assert given_out == ["a", "👍", "b"]


def test_a_certain_part_of_a_token_does_not_wait() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("x 👍")  # " " and the emoji's first bytes are one token
    assert tokenizer.token_bytes(ids[1]) == b" \xf0\x9f"
    assert pieces(tokenizer, ids)[:2] == ["x", " "]


def test_an_incomplete_character_is_said_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a👍")[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.add, ids)) == "a"
    assert detokenizer.flush() == "�"


def test_special_tokens_are_text_only_when_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("<s>the</s>")
    assert "".join(pieces(tokenizer, ids)) == "the"
    assert pieces(tokenizer, ids, skip=False) == ["<s>", "the", "</s>", ""]
