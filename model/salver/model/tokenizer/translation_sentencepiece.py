"""SentencePiece models of translation models and summarizers: what their tokenizer classes make of them.

How a text is split is in the model file. Not in it are the ids, which fairseq and Pegasus chose otherwise,
the tokens around a text, and the languages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from ..errors import CheckpointError
from . import languages
from .sentencepiece import read_sentencepiece

_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True, slots=True)
class _Rules:
    """Of a tokenizer class.

    Attributes:
        front: what stands before the model's pieces, of which the first `replaced` are left out.
        languages: behind them, and then `mask`.
        language: that a text is in if the config does not say.
        listed: whether what the files list stands in their place, and not behind all.
        around: what is put around a text: EOS is the end of sequence, LANGUAGE the text's.
    """

    front: tuple[str, ...]
    replaced: int
    around: str
    languages: tuple[str, ...] = ()
    language: str = ""
    mask: str = "<mask>"
    listed: bool = False


_CLASSES = {
    "MBartTokenizer": _Rules(_FAIRSEQ, 3, "$A EOS LANGUAGE", languages.MBART, "en_XX"),
    "MBart50Tokenizer": _Rules(_FAIRSEQ, 3, "LANGUAGE $A EOS", languages.MBART50, "en_XX"),
    "NllbTokenizer": _Rules(_FAIRSEQ, 3, "LANGUAGE $A EOS", languages.NLLB, "eng_Latn", listed=True),
    "PegasusTokenizer": _Rules((), 2, "$A EOS", mask=""),  # see `_pegasus_front`
    "XGLMTokenizer": _Rules(_FAIRSEQ, 3, "EOS $A", tuple(f"<madeupword{i}>" for i in range(7)), mask=""),
}
_FILES = ("sentencepiece.bpe.model", "spiece.model", "sentencepiece.model")


def read_translation_sentencepiece(
    path: Path, settings: dict[str, Any], special: dict[str, Any]
) -> Tokenizer | None:
    """The tokenizer of such a model's directory; None where it is of another kind.

    `settings` is tokenizer_config.json, `special` special_tokens_map.json. Raises CheckpointError.
    """
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    file = next((path / file for file in _FILES if (path / file).is_file()), None)
    if name not in _CLASSES or file is None:
        return None
    rules, named = _CLASSES[name], {**special, **settings}
    front = _pegasus_front(path, named) if name == "PegasusTokenizer" else rules.front
    mask = _spelled(named.get("mask_token"), rules.mask) if rules.mask else ""
    numbered = _numbered(path, named)
    back = _back(named, rules, mask, [mark for mark in numbered if mark not in front])
    unknown = _spelled(named.get("unk_token"), "<unk>")
    tokenizer = read_sentencepiece(file, front=front, replaced=rules.replaced, back=back, unknown=unknown)
    eos = _spelled(named.get("eos_token"), "</s>")
    marks = dict.fromkeys((*front, *back, eos, unknown))
    tokenizer.add_special_tokens(  # the mask takes the space before it
        [AddedToken(mark, normalized=False, lstrip=mark == mask) for mark in marks]
    )
    for mark, index in numbered.items():
        if tokenizer.token_to_id(mark) != index:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: added_tokens_decoder has {mark} at {index}; by the rules "
                f"of {name} it is {tokenizer.token_to_id(mark)}"
            )
    around = rules.around
    if name == "NllbTokenizer" and named.get("legacy_behaviour"):
        around = "$A EOS LANGUAGE"
    language = str(named.get("src_lang") or rules.language)
    tokenizer.post_processor = _around(path, tokenizer, around, {"EOS": eos, "LANGUAGE": language})
    return tokenizer


def _pegasus_front(path: Path, named: dict[str, Any]) -> tuple[str, ...]:
    """Padding, the end of sequence, and `offset` marks that only its training knew."""
    offset = named.get("offset", 103)
    if not isinstance(offset, int) or offset < 0:
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: offset is {offset!r}, not a count")
    marks = [_spelled(named.get("pad_token"), "<pad>"), _spelled(named.get("eos_token"), "</s>")]
    if offset:
        sentence = named.get("mask_token_sent", "<mask_1>")
        marks += [] if sentence is None else [_spelled(sentence, "<mask_1>")]
        marks.append(_spelled(named.get("mask_token"), "<mask_2>"))
        marks += [f"<unk_{i}>" for i in range(2, offset)]
    return tuple(marks)


def _numbered(path: Path, named: dict[str, Any]) -> dict[str, int]:
    """Special tokens with their ids, lowest first, where the config has them."""
    entries = named.get("added_tokens_decoder") or {}
    try:
        found = {_spelled(entry, ""): int(index) for index, entry in entries.items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: added_tokens_decoder: tokens by their ids were expected"
        ) from error
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _back(named: dict[str, Any], rules: _Rules, mask: str, numbered: list[str]) -> tuple[str, ...]:
    """What stands behind the pieces; `numbered` are those whose ids are known, in their order."""
    if rules.listed and mask in numbered and len(numbered) > 1:
        return tuple(numbered)
    found = named.get("extra_special_tokens") or named.get("additional_special_tokens") or ()
    listed = [_spelled(token, "") for token in found]
    known = listed if rules.listed and listed else rules.languages
    marks = (*known, mask, *listed) if rules.mask else known
    return tuple(dict.fromkeys(marks))


def _around(path: Path, tokenizer: Tokenizer, around: str, marks: dict[str, str]) -> Any:
    parts = [marks.get(part, part) for part in around.split()]
    ids = []
    for part in parts:
        index = tokenizer.token_to_id(part)
        if part != "$A" and index is None:
            raise CheckpointError(f"{path}: the special token {part} is not in the vocabulary")
        if part != "$A":
            ids.append((part, index))
    pair = [other for part in parts for other in (("$A", "$B") if part == "$A" else (part,))]
    return processors.TemplateProcessing(single=parts, pair=pair, special_tokens=list(dict(ids).items()))


def _spelled(value: object, usual: str) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else usual
