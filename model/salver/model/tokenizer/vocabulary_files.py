"""Tokenizers of encoders that were published before tokenizer.json: vocab.txt, or RoBERTa's two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError

# The tokenizer classes that vocab.txt is read for, as transformers converts them.
_WORD_PIECE = ("Bert", "DistilBert", "Electra", "MPNet")


def read_vocabulary_files(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """The tokenizer of a directory without tokenizer.json; None where there is none of these files.

    `settings` is tokenizer_config.json. Raises CheckpointError, naming the file.
    """
    if (path / "vocab.txt").is_file():
        return _word_piece(path / "vocab.txt", settings)
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if (
        named in ("RobertaTokenizer", "BartTokenizer")
        and (path / "vocab.json").is_file()
        and (path / "merges.txt").is_file()
    ):
        return _byte_pairs(path, settings)
    return None


def add_listed_tokens(
    tokenizer: tokenizers.Tokenizer, path: Path, settings: dict[str, Any], special: dict[str, Any]
) -> None:
    """Adds the tokens that a directory without tokenizer.json lists beside its vocabulary.

    They are in added_tokens.json, or in the `added_tokens_decoder` of tokenizer_config.json (`settings`).
    `special` is special_tokens_map.json. Raises CheckpointError where one would not get its id.
    """
    for where, index, token in sorted(_listed(path, settings, special), key=lambda found: found[1]):
        if tokenizer.token_to_id(token.content) is None:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"{path / where}: {token.content!r} is token {index} there, but {found} here"
            )


def _listed(
    path: Path, settings: dict[str, Any], special: dict[str, Any]
) -> list[tuple[str, int, AddedToken]]:
    """File, id and token."""
    found: list[tuple[str, int, AddedToken]] = []
    named = {text for names in (special, settings) for value in names.values() for text in _texts(value)}
    file = path / "added_tokens.json"
    try:
        listed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for text, index in listed.items():
            known = text in named
            found.append((file.name, int(index), AddedToken(text, normalized=not known, special=known)))
        for index, entry in (settings.get("added_tokens_decoder") or {}).items():
            token = AddedToken(**{"special": False, "normalized": True, **entry})
            found.append(("tokenizer_config.json", int(index), token))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its added tokens cannot be read: {error}") from error
    return found


def _texts(value: object) -> list[str]:
    """The tokens that a field names: a string, an object with `content`, or a list of them."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        value = value.get("content")
    return [value] if isinstance(value, str) else []


def _class_of(path: Path, settings: dict[str, Any], supported: tuple[str, ...], default: str) -> str:
    name = str(settings.get("tokenizer_class") or default)
    name = name.removesuffix("Fast").removesuffix("Tokenizer")
    if name not in supported:
        raise CheckpointError(
            f"{path}: for the tokenizer_class {name}Tokenizer a tokenizer.json is needed "
            f"(without one: {', '.join(supported)})"
        )
    return name


def _special(settings: dict[str, Any], key: str, default: str) -> str:
    value = settings.get(key, default)
    return str(value.get("content")) if isinstance(value, dict) else str(value)


def _word_piece(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's: lower case, accents and Chinese characters as the settings say."""
    kind = _class_of(path, settings, _WORD_PIECE, "Bert")
    if settings.get("do_basic_tokenize") is False:
        raise CheckpointError(f"{path.parent}: do_basic_tokenize is false, which is not supported")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    words = lines[:-1] if lines and not lines[-1] else lines
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words)}
    marks = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    if kind == "MPNet":
        marks = ("[UNK]", "<s>", "</s>", "<pad>", "<mask>")
    keys = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    unknown, first, last, *others = (_special(settings, k, m) for k, m in zip(keys, marks, strict=True))
    missing = [mark for mark in (unknown, first, last) if mark not in vocabulary]
    if missing:
        raise CheckpointError(f"{path}: the special token {missing[0]} is not in the vocabulary")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = [mark for mark in (unknown, first, last, *others) if mark in vocabulary]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in special])
    pair = f"{first}:0 $A:0 {last}:0 $B:1 {last}:1"
    if kind == "MPNet":
        pair = f"{first}:0 $A:0 {last}:0 {last}:0 $B:1 {last}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=pair,
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    return tokenizer


def _byte_pairs(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """RoBERTa's: bytes, and special tokens around a text."""
    space = bool(settings.get("add_prefix_space", False))
    try:
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [
            (left, right)
            for line in lines
            if line and not line.startswith("#version")
            for left, _, right in (line.partition(" "),)
        ]
        model = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="")
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path / 'vocab.json'}: cannot be read: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    first, last = _special(settings, "cls_token", "<s>"), _special(settings, "sep_token", "</s>")
    special = [first, "<pad>", last, _special(settings, "unk_token", "<unk>")]
    tokenizer.add_special_tokens(
        [AddedToken(mark, normalized=False) for mark in special if mark in vocabulary]
    )
    mask = _special(settings, "mask_token", "<mask>")
    tokenizer.add_special_tokens(
        [AddedToken(mark, lstrip=True, normalized=False) for mark in [mask] if mark in vocabulary]
    )
    try:
        ends = (last, vocabulary[last]), (first, vocabulary[first])
    except KeyError as error:
        raise CheckpointError(f"{path / 'vocab.json'}: the special token {error} is missing") from error
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=space)
    return tokenizer
