"""SentencePiece models of encoders: what their tokenizer classes make of the pieces, texts and pairs.

A tokenizer class of an encoder has rules that are not in its model file: ids of its own, accents and
case, special tokens around texts. Offsets leave out the space before a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError
from .sentencepiece import CONTROL, SPACE, UNIGRAM, USER_DEFINED, read_model

Pieces = list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Of a tokenizer class. `pair` is a template of CLS and SEP, whatever they are called."""

    pieces: Callable[[Pieces], Pieces]
    unknown: str
    special: dict[str, str]  # the names in tokenizer_config.json, and what they are if it does not say
    pair: str
    normalizers: Callable[[bytes, dict[str, Any]], list[normalizers.Normalizer]]
    split: Callable[[dict[str, Any]], list[pre_tokenizers.PreTokenizer]]
    mask_strips: bool = True  # the mask token takes the space before it


def _precompiled(charsmap: bytes) -> list[normalizers.Normalizer]:
    return [normalizers.Precompiled(charsmap)] if charsmap else []


def _plain_normalizers(charsmap: bytes, settings: dict[str, Any]) -> list[normalizers.Normalizer]:
    return _precompiled(charsmap)


def _at_spaces(settings: dict[str, Any]) -> list[pre_tokenizers.PreTokenizer]:
    """The charsmap has made spaces of all white space."""
    return [pre_tokenizers.Split(" ", behavior="removed")]


# ---- ALBERT ----


def _albert_pieces(pieces: Pieces) -> Pieces:
    """Pieces of a digit and a comma are as good as never taken."""
    return [
        (piece, score - 100 if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit() else score)
        for piece, score in pieces
    ]


def _albert_normalizers(charsmap: bytes, settings: dict[str, Any]) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not settings.get("keep_accents", False):
        found += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.get("do_lower_case", True):
        found.append(normalizers.Lowercase())
    return [*found, *_precompiled(charsmap)]


# ---- XLM-R, CamemBERT: ids of fairseq, which put its own special tokens first ----


def _fairseq_pieces(pieces: Pieces) -> Pieces:
    marks = ("<s>", "<pad>", "</s>", "<unk>")
    return [*((mark, 0.0) for mark in marks), *pieces[3:], ("<mask>", 0.0)]


def _camembert_pieces(pieces: Pieces) -> Pieces:
    marks = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>")
    return [*((mark, 0.0) for mark in marks), ("<unk>NOTUSED", -100.0), *pieces[1:], ("<mask>", 0.0)]


# ---- DeBERTa v2, v3 ----


def _deberta_normalizers(charsmap: bytes, settings: dict[str, Any]) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if settings.get("do_lower_case", False):
        found.append(normalizers.Lowercase())
    return [
        *found,
        normalizers.Strip(),
        *_precompiled(charsmap),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]


def _deberta_split(settings: dict[str, Any]) -> list[pre_tokenizers.PreTokenizer]:
    by_mark = [pre_tokenizers.Punctuation(behavior="isolated")] if settings.get("split_by_punct") else []
    return [*by_mark, *_at_spaces(settings)]


_BRACKETS = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}  # fmt: skip
_ANGLES = {
    "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>",
    "mask_token": "<mask>",
}  # fmt: skip
_SEGMENTED = "CLS:0 $A:0 SEP:0 $B:1 SEP:1"
_DOUBLED = "CLS:0 $A:0 SEP:0 SEP:0 $B:0 SEP:0"
_CLASSES = {
    "AlbertTokenizer": _Rules(
        _albert_pieces, "<unk>", {**_BRACKETS, "unk_token": "<unk>", "pad_token": "<pad>"}, _SEGMENTED,
        _albert_normalizers, _at_spaces,
    ),
    "XLMRobertaTokenizer": _Rules(
        _fairseq_pieces, "<unk>", _ANGLES, _DOUBLED,
        _plain_normalizers, _at_spaces,
    ),
    "CamembertTokenizer": _Rules(
        _camembert_pieces, "<unk>", _ANGLES, _DOUBLED,
        _plain_normalizers, _at_spaces,
    ),
    "DebertaV2Tokenizer": _Rules(
        lambda pieces: pieces, "[UNK]", _BRACKETS, _SEGMENTED,
        _deberta_normalizers, _deberta_split, mask_strips=False,
    ),
}  # fmt: skip
# Of which class a model of config.json's `model_type` is, where tokenizer_config.json does not say.
_BY_MODEL = {
    "albert": "AlbertTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
}
_FILES = ("spiece.model", "sentencepiece.bpe.model", "spm.model")


def read_encoder_sentencepiece(
    path: Path, settings: dict[str, Any], special: dict[str, Any], model_type: str
) -> Tokenizer | None:
    """The tokenizer of an encoder's directory; None where it is of another kind.

    `settings` is tokenizer_config.json, `special` special_tokens_map.json, `model_type` of config.json.
    Raises CheckpointError.
    """
    name = str(settings.get("tokenizer_class") or _BY_MODEL.get(model_type, "")).removesuffix("Fast")
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if name not in _CLASSES or file is None:
        return None
    rules, model = _CLASSES[name], read_model(file)
    if model.trainer_spec.model_type != UNIGRAM:
        raise CheckpointError(f"{file}: only a unigram model is implemented for {name}")
    pieces = rules.pieces([(piece.piece, piece.score) for piece in model.pieces])
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    if rules.unknown not in ids:
        raise CheckpointError(f"{file}: {rules.unknown} is not among its pieces")
    tokenizer = Tokenizer(models.Unigram(pieces, ids[rules.unknown], False))
    named = {**rules.special, **_named(special), **_named(settings)}
    charsmap = model.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(rules.normalizers(charsmap, settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*rules.split(settings), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    kinds = {CONTROL: True, USER_DEFINED: False}
    for piece in model.pieces:  # spelled in a text they are what they are
        if piece.type in kinds and piece.piece in ids:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=kinds[piece.type])])
    marks = [AddedToken(named[key], normalized=False) for key in rules.special if key != "mask_token"]
    mask = AddedToken(named["mask_token"], normalized=False, lstrip=rules.mask_strips)
    tokenizer.add_special_tokens([*marks, mask])
    tokenizer.post_processor = _around(tokenizer, named, rules)
    return tokenizer


def _around(tokenizer: Tokenizer, named: dict[str, str], rules: _Rules) -> processors.TemplateProcessing:
    first, last = named["cls_token"], named["sep_token"]
    pair = rules.pair.replace("CLS", first).replace("SEP", last)
    known = [(mark, index) for mark in (first, last) if (index := tokenizer.token_to_id(mark)) is not None]
    return processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0", pair=pair, special_tokens=list(dict(known).items())
    )


def _named(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a file names, as strings or objects with `content`."""
    found = {}
    for key in _BRACKETS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found
