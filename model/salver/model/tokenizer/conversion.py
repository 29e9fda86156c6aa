"""Tokenizers of checkpoints without tokenizer.json: a SentencePiece model, or vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ..errors import CheckpointError
from .encoder_sentencepiece import read_encoder_sentencepiece
from .sentencepiece import read_sentencepiece
from .translation_sentencepiece import read_translation_sentencepiece

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Classes of tokenizer_config.json whose rules are those here; without one, the files speak for themselves.
# The value: whether a text begins with the beginning-of-sequence token if the config does not say.
SENTENCEPIECE_CLASSES = {
    "LlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "T5Tokenizer": False,
    "MT5Tokenizer": False,
}
ENDING = ("T5Tokenizer", "MT5Tokenizer")  # a text ends with the end-of-sequence token
BYTE_LEVEL_CLASSES = {"GPT2Tokenizer": False, "CodeGenTokenizer": False, "BlenderbotTokenizer": False}
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def convert(
    path: Path, settings: dict[str, Any], special: dict[str, Any], model_type: str = ""
) -> Tokenizer | None:
    """The tokenizer of a directory, None where it has none of these files.

    `settings` is its tokenizer_config.json, `special` its special_tokens_map.json, `model_type` of its
    config.json. Raises CheckpointError.
    """
    encoder = read_encoder_sentencepiece(path, settings, special, model_type)
    if encoder is not None:
        return encoder
    translation = read_translation_sentencepiece(path, settings, special)
    if translation is not None:
        return translation
    named = {**special, **settings}
    for name in SENTENCEPIECE:
        if (path / name).is_file():
            begins = _begins(path, named, SENTENCEPIECE_CLASSES, name, default=True)
            tokenizer = _finished(read_sentencepiece(path / name), named, begins)
            if str(named.get("tokenizer_class") or "").removesuffix("Fast") in ENDING:
                marks = [f"<extra_id_{i}>" for i in reversed(range(int(named.get("extra_ids", 100))))]
                tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
                _end_with_eos(path, tokenizer, named)
            return tokenizer
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        begins = _begins(path, named, BYTE_LEVEL_CLASSES, "merges.txt", default=False)
        tokenizer = _finished(_byte_level(path, named), named, begins)
        if _is_blenderbot(named):
            _end_with_eos(path, tokenizer, named)
        return tokenizer
    return None


def _begins(path: Path, named: dict[str, Any], classes: dict[str, bool], file: str, *, default: bool) -> bool:
    """Whether a text begins with the beginning-of-sequence token."""
    name = str(named.get("tokenizer_class") or "").removesuffix("Fast")
    if name and name not in classes:
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: tokenizer_class {name!r} without tokenizer.json is not "
            f"implemented (beside {file}: {', '.join(sorted(classes))})"
        )
    if named.get("add_eos_token"):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: add_eos_token without tokenizer.json is not implemented"
        )
    begins = named.get("add_bos_token")
    return classes.get(name, default) if begins is None else bool(begins)


def _is_blenderbot(named: dict[str, Any]) -> bool:
    return str(named.get("tokenizer_class") or "").removesuffix("Fast") == "BlenderbotTokenizer"


def _byte_level(path: Path, named: dict[str, Any]) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # what the library raises is a bare Exception
        raise CheckpointError(f"{path / 'merges.txt'}: not a vocabulary that can be read: {error}") from error
    tokenizer = Tokenizer(model)
    space = bool(named.get("add_prefix_space", _is_blenderbot(named)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: Tokenizer, named: dict[str, Any], begins: bool) -> Tokenizer:
    """With the special tokens that the configs name, and the beginning-of-sequence token in front."""
    found = [token for name in NAMED if (token := _token(named.get(name))) is not None]
    listed = named.get("added_tokens_decoder")
    for _, entry in sorted(
        (listed if isinstance(listed, dict) else {}).items(), key=lambda item: int(item[0])
    ):
        token = _token(entry)
        if token is not None:
            found.append(token)
    tokenizer.add_tokens([token for token in found if not token.special])
    tokenizer.add_special_tokens([token for token in found if token.special])
    bos = _token(named.get("bos_token"))
    index = None if bos is None else tokenizer.token_to_id(bos.content)
    if begins and bos is not None and index is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos.content, "$A"],
            pair=[bos.content, "$A", bos.content, "$B"],
            special_tokens=[(bos.content, index)],
        )
    return tokenizer


def _end_with_eos(path: Path, tokenizer: Tokenizer, named: dict[str, Any]) -> None:
    """Texts end so."""
    eos = _token(named.get("eos_token")) or AddedToken("</s>", special=True, normalized=False)
    index = tokenizer.token_to_id(eos.content)
    if index is None:
        raise CheckpointError(f"{path}: the special token {eos.content} is not in the vocabulary")
    unknown = _token(named.get("unk_token")) or AddedToken("<unk>", special=True, normalized=False)
    tokenizer.add_special_tokens([m for m in (eos, unknown) if tokenizer.token_to_id(m.content) is not None])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", eos.content],
        pair=["$A", eos.content, "$B", eos.content],
        special_tokens=[(eos.content, index)],
    )


def _token(value: object) -> AddedToken | None:
    """As tokenizer_config.json writes it: a string, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: bool(value.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)
