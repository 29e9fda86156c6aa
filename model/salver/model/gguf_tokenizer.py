"""tokenizer.json and its companions from a GGUF file's `tokenizer.*` metadata.

Byte-level BPE only. What a pre-tokenizer name means is in llama.cpp (src/llama-vocab.cpp);
the pieces here are those of the Hugging Face tokenizers that the names were made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import CheckpointError
from .gguf_reader import GGUFFile

_T = TypeVar("_T")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type; the rest needs no care

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
_QWEN2_PATTERN = _CONTRACTIONS + r"\p{N}" + _REST


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """What `tokenizer.ggml.pre` stands for. `add_bos`: the default where the file does not say."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_LLAMA3 = _PreTokenizer(_split(_LLAMA3_PATTERN), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_gpt2),
    "smollm": _PreTokenizer(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _PreTokenizer(_split(_QWEN2_PATTERN), nfc=True),
}


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the converted directory needs of the tokenizer: two files' contents and the special ids."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    vocab_size: int


def read_tokenizer(file: GGUFFile, context_length: int) -> TokenizerFiles:
    """Build the tokenizer of `file`; `context_length` in tokens. Raises CheckpointError naming the field."""
    model = _field(file, "tokenizer.ggml.model", str)
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is implemented"
        )
    pre_name = _field(file, "tokenizer.ggml.pre", str)
    pre = PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {pre_name!r}, which is not implemented (those are: {known})"
        )
    tokens: list[str] = _field(file, "tokenizer.ggml.tokens", list)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens has {twice!r} twice")
    types = _optional(file, "tokenizer.ggml.token_type", list) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    ids = {
        name: _token_id(file, name, len(tokens))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    tokenizer = _build(file, vocab, pre)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    tokenizer.post_processor = _post_processor(file, pre, tokens, ids)
    eos = tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None))
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = ids[name]
        if token_id is not None:
            config[f"{key}_token"] = tokens[token_id]
    template = _optional(file, "tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    return TokenizerFiles(
        tokenizer.to_str(pretty=False), config, ids["bos"], eos, ids["padding"], len(tokens)
    )


def _build(file: GGUFFile, vocab: dict[str, int], pre: _PreTokenizer) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for merge in _field(file, "tokenizer.ggml.merges", list):
        left, space, right = str(merge).partition(" ")
        if not (space and left in vocab and right in vocab and left + right in vocab):
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges has {merge!r}, of tokens that the vocabulary lacks"
            )
        merges.append((left, right))
    # No unknown token: a byte that the vocabulary lacks is left out, as llama.cpp leaves it out.
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _post_processor(
    file: GGUFFile, pre: _PreTokenizer, tokens: list[str], ids: dict[str, int | None]
) -> processors.PostProcessor:
    # Offsets are not trimmed: a token's text keeps the space that its bytes start with.
    untrimmed = processors.ByteLevel(trim_offsets=False)
    add_bos = _optional(file, "tokenizer.ggml.add_bos_token", bool)
    ends: dict[str, bool] = {
        "bos": pre.add_bos if add_bos is None else add_bos,
        "eos": _optional(file, "tokenizer.ggml.add_eos_token", bool) or False,
    }
    pieces, special = ["$A"], []
    for name, wanted in ends.items():
        if not wanted:
            continue
        token_id = ids[name]
        if token_id is None:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.add_{name}_token is set without tokenizer.ggml.{name}_token_id"
            )
        token = tokens[token_id]
        pieces = [token, *pieces] if name == "bos" else [*pieces, token]
        special.append((token, token_id))
    if not special:
        return untrimmed
    template = processors.TemplateProcessing(single=pieces, special_tokens=special)
    return processors.Sequence([untrimmed, template])


def _optional(file: GGUFFile, name: str, kind: type[_T]) -> _T | None:
    value = file.fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise CheckpointError(f"{file.path}: {name} is {value!r:.60}, not of type {kind.__name__}")
    return value


def _field(file: GGUFFile, name: str, kind: type[_T]) -> _T:
    value = _optional(file, name, kind)
    if value is None:
        raise CheckpointError(f"{file.path}: metadata field {name} is missing")
    return value


def _token_id(file: GGUFFile, name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = _optional(file, key, int)
    if value is not None and not 0 <= value < vocab_size:
        raise CheckpointError(f"{file.path}: {key} is {value}, outside the vocabulary of {vocab_size}")
    return value
