"""Tokenizers without a tokenizer.json against transformers' own reading of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, pre_tokenizers

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer

MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ b", "o o", "oo k"]
TEXTS = ["the book in the", " the  book\n", "naïve 👍 <mask> in", "In<mask>the book</s>", "it's 12,345"]


def write_byte_pairs(path: Path, **settings: object) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [
        *special,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(m.replace(" ", "") for m in MERGES),
        "<mask>",
    ]
    (path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def test_roberta_vocabulary_and_merges(tmp_path: Path) -> None:
    from transformers import RobertaTokenizerFast

    write_byte_pairs(tmp_path, tokenizer_class="RobertaTokenizer")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    merges = [(a, b) for a, b in (line.split(" ") for line in MERGES)]
    # The mask takes the space before it along, as in the tokenizer.json of roberta-base.
    mask = AddedToken("<mask>", lstrip=True, special=True)
    theirs = RobertaTokenizerFast(vocab=vocabulary, merges=merges, mask_token=mask)
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.mask_token_id == vocabulary["<mask>"]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert list(ours.encode_input(text, "the book").token_ids) == theirs(text, "the book").input_ids
        offsets = theirs(text, return_offsets_mapping=True)["offset_mapping"]
        assert list(ours.encode_input(text).offsets) == offsets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, r"tokenizer_class 'XLMRobertaTokenizer' without"),
        ({"tokenizer_class": "RobertaTokenizer", "cls_token": "[CLS]"}, r"vocab\.json: .*\[CLS\]"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    write_byte_pairs(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_a_word_piece_vocabulary_without_its_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("the\n[UNK]\n[CLS]\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: the special token \[SEP\]"):
        Tokenizer.from_directory(tmp_path)
