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


def write_word_pieces(path: Path, **settings: object) -> None:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "book",
        "##s",
        "in",
        "paris",
        ",",
        "<",
        ">",
        "new",
    ]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    (path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))


ADDED = {"Paris": 14, "<new>": 15, "[E1]": 16}


@pytest.mark.parametrize("listed", ["added_tokens.json", "added_tokens_decoder"])
def test_tokens_beside_a_vocabulary(tmp_path: Path, listed: str) -> None:
    """Spelled in a text they are one token; a special one also where the text is written otherwise."""
    from transformers import BertTokenizer

    if listed == "added_tokens.json":
        write_word_pieces(tmp_path)
        (tmp_path / listed).write_text(json.dumps(ADDED))
        special = {"extra_special_tokens": ["[E1]"], "cls_token": "[SEP]"}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    else:
        entries = {
            index: {"content": text, "special": text == "[E1]", "normalized": text == "Paris", "lstrip": True}
            for text, index in ADDED.items()
        }
        write_word_pieces(tmp_path, added_tokens_decoder=entries)
    ours, theirs = Tokenizer.from_directory(tmp_path), BertTokenizer.from_pretrained(str(tmp_path))
    for text in ("the books in Paris, PARIS <new>", "[E1] in [e1] <NEW>paris", "the<new>book[E1]"):
        assert ours.encode(text) == theirs(text).input_ids, text
    assert ours.encode("Paris")[1:-1] == [14]


def test_an_added_token_with_another_id_is_refused(tmp_path: Path) -> None:
    for tokens in ({"<new>": 20}, {"book": 14}):
        write_word_pieces(tmp_path)
        (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
        with pytest.raises(CheckpointError, match=rf"added_tokens\.json: '{next(iter(tokens))}' is token"):
            Tokenizer.from_directory(tmp_path)
    write_word_pieces(tmp_path, do_basic_tokenize=False)
    with pytest.raises(CheckpointError, match="do_basic_tokenize"):
        Tokenizer.from_directory(tmp_path)
