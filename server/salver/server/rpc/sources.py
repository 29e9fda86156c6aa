"""What an encoder-decoder reads: the source's tokens, its languages, and the room beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from salver.model.spec import ModelSpec
from salver.model.tokenizer.encoding import EncodedText
from salver.server.engine.beam import beam_capacity
from salver.server.engine.request import BeamParams
from salver.server.rpc.configuration import CHECKPOINT
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.served import ServedModel
from salver.server.rpc.validation import GenerationParams, Violations

_SHOWN_LANGUAGES = 8
_MARIAN = ">>"  # its languages stand in the source, where all others' begin the output


@dataclass(frozen=True, slots=True)
class Source:
    """The tokens that the encoder reads, and those that the output begins with."""

    token_ids: tuple[int, ...]
    start: tuple[int, ...]


NO_SOURCE = Source((), ())


def check_languages(request: Any, model: ServedModel, violations: Violations) -> None:
    """The languages of a request: only those of a translation model, and only ones that it knows."""
    known = model.tokenizer.languages
    for name in ("source_language", "target_language"):
        code = getattr(request, name, "")
        if not code:
            continue
        if model.source is None:
            violations.add(name, f"{model.architecture} reads no source: it translates nothing")
        elif not known:
            violations.add(name, "the checkpoint's tokenizer names no languages to choose from")
        elif code not in known:
            shown = ", ".join(list(known)[:_SHOWN_LANGUAGES])
            more = f" and {len(known) - _SHOWN_LANGUAGES} more" if len(known) > _SHOWN_LANGUAGES else ""
            violations.add(name, f"is not one of the tokenizer's languages: {shown}{more}")
        elif name == "source_language" and _in_source(model):
            violations.add(name, f"{model.architecture} is not told in which language a source is")
    begins = not isinstance(model.spec, ModelSpec) or model.source is None or bool(model.spec.output_start)
    if not begins and not getattr(request, "target_language", ""):
        violations.add("target_language", "is needed: the checkpoint does not say how an output begins")


def _in_source(model: ServedModel) -> bool:
    """Whether the language to translate into is told at the begin of the source (Marian)."""
    return any(
        (model.tokenizer.token(token_id) or "").startswith(_MARIAN)
        for token_id in model.tokenizer.languages.values()
    )


def source_of(request: Any, token_ids: Sequence[int], model: ServedModel) -> Source:
    """The source of a request whose languages were checked; `token_ids` are its prompt's."""
    spec, languages = model.spec, model.tokenizer.languages
    assert isinstance(spec, ModelSpec)
    ids = list(token_ids)
    source, target = (
        languages.get(getattr(request, f"{side}_language", "")) for side in ("source", "target")
    )
    if source is not None:
        _say_language(ids, source, set(languages.values()))
    if target is None:
        return Source(tuple(ids), spec.output_start)
    if _in_source(model):
        told = ids[:1] if ids[0] in languages.values() else []
        return Source((target, *ids[len(told) :]), spec.output_start)
    start = spec.decoder_start_token_id
    if start is None or start in languages.values():  # mBART's output begins with nothing but its language
        return Source(tuple(ids), (target,))
    return Source(tuple(ids), (start, target))


def told_languages(tokens: EncodedText, source: Source) -> EncodedText:
    """The text that became this source, with the languages that it was told."""
    added = source.token_ids[: len(source.token_ids) - len(tokens)]
    return replace(tokens.around(added), token_ids=source.token_ids)


def _say_language(ids: list[int], language: int, languages: set[int]) -> None:
    """Puts the language where the tokenizer puts its default: first, or last; else first."""
    for place in (0, -1):
        if ids[place] in languages:
            ids[place] = language
            return
    ids.insert(0, language)


def check_source_length(num_tokens: int, field: str, model: ServedModel) -> None:
    """Raises ApiError (OUT_OF_RANGE) for more than the encoder reads."""
    assert model.source is not None
    most = model.source.max_input_tokens
    if num_tokens > most:
        raise out_of_range(
            f"{field} is {num_tokens} tokens; the encoder reads at most {most}",
            prompt_tokens=num_tokens,
            max_input_tokens=most,
        )


def output_capacity(source: Source, model: ServedModel, beams: BeamParams | None = None) -> int:
    """How many tokens an output, with what it begins with, can have beside its source. At least 0."""
    limits = model.limits
    size = model.ready.block_size
    beside = limits.cache_tokens - -(-len(source.token_ids) // size) * size
    if beams is not None:
        beside = beam_capacity(len(source.start), beams.num_beams, beside // size, size)
    return max(0, min(limits.max_model_len, beside))


def room_beside(params: GenerationParams, source: Source, model: ServedModel) -> int:
    """How many tokens may be generated. Raises ApiError (OUT_OF_RANGE) where that is less than asked for."""
    check_source_length(len(source.token_ids), "the prompt", model)
    limits, capacity = model.limits, output_capacity(source, model, params.beams)
    room = capacity - len(source.start)
    numbers = {
        "prompt_tokens": len(source.token_ids),
        "max_model_len": limits.max_model_len,
        "kv_cache_tokens": limits.cache_tokens,
    }
    if room < 1:
        raise out_of_range(
            f"the prompt is {len(source.token_ids)} tokens; beside it the key-value cache of "
            f"{limits.cache_tokens} has no room for an output",
            **numbers,
        )
    if params.max_tokens is None:
        return room
    if params.max_tokens > room:
        if params.configuration.origins["stopping.max_tokens"] == CHECKPOINT:
            return room
        raise out_of_range(
            f"max_tokens is {params.max_tokens}; beside a source of {len(source.token_ids)} tokens an output "
            f"has room for {room}",
            **numbers,
            max_tokens=params.max_tokens,
        )
    return params.max_tokens


def score_prompt(
    source_ids: Sequence[int], output_ids: Sequence[int], field: str, request: Any, model: ServedModel
) -> tuple[Source, tuple[int, ...]]:
    """Of a context and a continuation: the source, and the output's tokens with those it begins with.

    Raises ApiError for one of them that is empty, or too long.
    """
    if not source_ids:
        raise invalid_argument([Violation(f"{field}.context", "tokenizes to nothing: it is the source")])
    if not output_ids:
        raise invalid_argument([Violation(f"{field}.continuation", "tokenizes to nothing")])
    source = source_of(request, source_ids, model)
    check_output(source, len(output_ids), f"{field}.context", f"{field}.continuation", model)
    return source, (*source.start, *output_ids)


def check_output(source: Source, num_tokens: int, context: str, field: str, model: ServedModel) -> None:
    """Raises ApiError (OUT_OF_RANGE) for a source or a given output that is too long.

    `context` and `field` are what the request calls them.
    """
    check_source_length(len(source.token_ids), context, model)
    room = output_capacity(source, model) - len(source.start)
    if num_tokens > room:
        raise out_of_range(
            f"{field} is {num_tokens} tokens; beside its source an output has room for {max(0, room)}",
            prompt_tokens=len(source.token_ids),
            max_model_len=model.limits.max_model_len,
            kv_cache_tokens=model.limits.cache_tokens,
        )
