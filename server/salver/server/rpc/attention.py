"""GetAttention: what a request asks for, the texts that it is of, and the matrices of the reply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salver.model.tokenizer.encoding import EncodedText
from salver.server.engine.request import AttentionOf, EncodingParams, Readout
from salver.server.rpc.convert import add_floats
from salver.server.rpc.encoding_call import encoding_params, fitted
from salver.server.rpc.encoding_messages import check_pair
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.served import ServedModel
from salver.server.rpc.sources import (
    NO_SOURCE,
    Source,
    check_languages,
    output_capacity,
    source_of,
    told_languages,
)
from salver.server.rpc.validation import Violations, check_prompt
from salver.server.tasks.attention import head_mean, merged, rollout, strongest, words_of
from salver.server.tasks.scores import Array
from salver.v1 import common_pb2, inspection_pb2

ENCODER = inspection_pb2.ATTENTION_KIND_ENCODER
DECODER = inspection_pb2.ATTENTION_KIND_DECODER
CROSS = inspection_pb2.ATTENTION_KIND_CROSS
_OF: dict[int, AttentionOf] = {
    ENCODER: AttentionOf.SOURCE,
    DECODER: AttentionOf.OWN,
    CROSS: AttentionOf.CROSS,
}


@dataclass(frozen=True, slots=True)
class WantedAttention:
    """The kind; the layers and heads, in rising order; and how many of each the kind has."""

    kind: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    num_layers: int
    num_heads: int
    is_rollout: bool

    @property
    def computed_layers(self) -> tuple[int, ...]:
        return tuple(range(self.layers[-1] + 1)) if self.is_rollout else self.layers


@dataclass(frozen=True, slots=True)
class AttentionTexts:
    """The tokens that rows and columns are of, and the source of an encoder-decoder."""

    queries: EncodedText
    keys: EncodedText
    source: Source = NO_SOURCE

    @property
    def truncated(self) -> int:
        same = self.queries is self.keys
        return self.keys.truncated + (0 if same else self.queries.truncated)


def check_attention(request: Any, model: ServedModel, violations: Violations) -> WantedAttention:
    """What a GetAttentionRequest asks for. Nothing is raised for violations here."""
    check_prompt(request.prompt, "prompt", model.input_vocab_size, violations)
    kind = _check_kind(request, model, violations)
    sizes = (model.num_layers, model.num_heads)
    if kind == ENCODER and model.source is not None:
        sizes = (len(model.source.order), model.source.num_heads)
    chosen = []
    for name, count in zip(("layers", "heads"), sizes, strict=True):
        for position, index in enumerate(getattr(request, name)):
            if index >= count:
                violations.add(f"{name}[{position}]", f"{index} must be below {count}, the model's {name}")
                break
        chosen.append(tuple(sorted(set(getattr(request, name)))) or tuple(range(count)))
    is_rollout = request.view == inspection_pb2.ATTENTION_VIEW_ROLLOUT
    if request.view not in inspection_pb2.AttentionView.values():
        violations.add("view", f"{request.view} is not a view")
    if is_rollout and request.heads:
        violations.add("heads", "cannot be chosen for a rollout, which is of all heads")
    if is_rollout and kind == CROSS:
        violations.add("view", "a rollout is of a text's attention to itself: of ENCODER or DECODER")
    if request.HasField("top_k") and request.top_k < 1:
        violations.add("top_k", "must be at least 1")
    if request.HasField("pair"):
        if model.encoder is None:
            what = "a decoder" if model.source is None else "an encoder-decoder"
            violations.add("pair", f"{model.name!r} is {what}, which reads one text")
        elif _are_ids(request.prompt):
            violations.add("pair", "needs a text beside it, not token ids")
        else:
            check_pair("pair", model, violations)
    if request.merge_words and (_are_ids(request.prompt) or _are_ids(request.target)):
        violations.add("merge_words", "needs a text: token ids have no words")
    check_languages(request, model, violations)
    return WantedAttention(kind, chosen[0], chosen[1], *sizes, is_rollout)


def _check_kind(request: Any, model: ServedModel, violations: Violations) -> int:
    """The kind that is meant, and whether there is a target where that needs one."""
    kind, names = request.kind, inspection_pb2.AttentionKind
    if kind not in names.values():
        violations.add("kind", f"{kind} is not a kind")
    if model.source is None:
        own, what = (DECODER, "a decoder") if model.encoder is None else (ENCODER, "an encoder")
        if kind not in (0, own):
            violations.add("kind", f"{model.name!r} is {what}, which has its own attention alone")
        if request.HasField("target"):
            violations.add("target", f"{model.name!r} is {what}: only an encoder-decoder has a target")
        return own
    kind = kind or CROSS
    if kind == ENCODER:
        if request.HasField("target"):
            violations.add("target", "is not read by the encoder")
    elif request.HasField("target"):
        check_prompt(request.target, "target", model.limits.vocab_size, violations)
    else:
        violations.add(
            "target",
            "is needed: the text (or ids) that an encoder-decoder writes, whose tokens attend to one another "
            "and to the prompt's; of the prompt alone there is the kind ENCODER",
        )
    return kind


def read_texts(request: Any, wanted: WantedAttention, model: ServedModel) -> AttentionTexts:
    """The tokens of a request that was checked. Raises ApiError for texts of none, and for too long ones."""
    pair = request.pair if request.HasField("pair") else None
    tokens = _tokens(request.prompt, "prompt", lambda text: model.tokenizer.encode_input(text, pair))
    if model.source is None:
        tokens = fitted(tokens, model.limits.capacity, "prompt", request.truncate, model)
        return AttentionTexts(tokens, tokens)
    source = source_of(request, tokens.token_ids, model)
    tokens = told_languages(tokens, source)
    tokens = fitted(tokens, model.source.max_input_tokens, "prompt", request.truncate, model)
    source = replace(source, token_ids=tokens.token_ids)
    if wanted.kind == ENCODER:
        start = source.start or (0,)  # the decoder computes a token behind what the encoder has read
        return AttentionTexts(tokens, tokens, replace(source, start=start))
    target = _tokens(request.target, "target", model.tokenizer.encode_written)
    target = target.of_text(1).around(source.start)
    target = fitted(target, output_capacity(source, model), "target", request.truncate, model)
    return AttentionTexts(target, target if wanted.kind == DECODER else tokens, source)


def _tokens(prompt: common_pb2.Prompt, field: str, encode: Callable[[str], EncodedText]) -> EncodedText:
    tokens = EncodedText.of_ids(prompt.token_ids.ids) if _are_ids(prompt) else encode(prompt.text)
    if not tokens.token_ids:
        raise invalid_argument([Violation(f"{field}.text", "tokenizes to nothing")])
    return tokens


def _are_ids(prompt: common_pb2.Prompt) -> bool:
    return bool(prompt.WhichOneof("prompt") == "token_ids")


def attention_input(
    texts: AttentionTexts, wanted: WantedAttention, model: ServedModel
) -> tuple[EncodedText, EncodingParams]:
    """What the engine computes, and what it is asked for of that."""
    tokens, of = texts.queries, AttentionOf.OWN
    if model.source is not None:
        of = _OF[wanted.kind]
        if of is AttentionOf.SOURCE:
            tokens = EncodedText.of_ids(texts.source.start)
    params = encoding_params(
        model, Readout.ATTENTION, tokens,
        layers=wanted.computed_layers, heads=wanted.heads, attention_of=of,
    )  # fmt: skip
    return tokens, params


def check_size(texts: AttentionTexts, wanted: WantedAttention, model: ServedModel) -> None:
    """Raises ApiError where the weights before any reduction are more than a message holds.

    It bounds the reply and also how long the step of the request's neighbours can take.
    """
    queries, keys = len(texts.queries), len(texts.keys)
    num_layers, num_heads = len(wanted.computed_layers), len(wanted.heads)
    size, most = 4 * queries * keys * num_layers * num_heads, model.limits.max_message_bytes
    room = most - most // 16  # for the units and the framing
    if size <= room:
        return
    pairs = room // (4 * num_layers * num_heads)
    fits = math.isqrt(pairs)
    shown, bound = f"{keys} tokens", f"at most {fits} tokens fit"
    if texts.queries is not texts.keys:
        shown, bound = f"{queries} tokens to {keys}", f"at most {pairs} pairs of tokens fit"
    raise out_of_range(
        f"the attention of {shown} in {num_layers} layers and {num_heads} heads is "
        f"{size} bytes, a message holds {most}: so many layers and heads of {bound}; "
        "ask for fewer layers or heads, or a shorter text",
        prompt_tokens=keys, layers=num_layers, heads=num_heads, max_tokens=fits,
    )  # fmt: skip


def attention_parts(
    request: Any, texts: AttentionTexts, wanted: WantedAttention, weights: Array, model: ServedModel
) -> dict[str, Any]:
    """The reply's units, queries and matrices, of weights [layers computed, heads, queries, keys]."""
    of_heads: tuple[int | None, ...] = wanted.heads
    if wanted.is_rollout:
        weights, of_heads = rollout(weights)[list(wanted.layers)], (None,)
    elif request.view == inspection_pb2.ATTENTION_VIEW_HEAD_MEAN:
        weights, of_heads = head_mean(weights), (None,)
    sides = [texts.queries, texts.keys]
    groups = [[[place] for place in range(len(side))] for side in sides]
    if request.merge_words:
        strings = (request.prompt.text, request.target.text or request.pair)
        groups = [words_of(strings, side) for side in sides]
        weights = merged(weights, *groups)
    matrices = []
    for layer, of_layer in zip(wanted.layers, weights, strict=True):
        for head, matrix in zip(of_heads, of_layer, strict=True):
            made = inspection_pb2.AttentionMatrix(layer=layer, head=head)
            if request.HasField("top_k"):
                made.links.extend(
                    inspection_pb2.AttentionLink(query=query, key=key, weight=weight)
                    for query, key, weight in strongest(matrix, request.top_k)
                )
            else:
                add_floats(made, "weights", matrix.ravel())
            matrices.append(made)
    queries, units = (_units(*both, model) for both in zip(groups, sides, strict=True))
    return {"matrices": matrices, "units": units, "queries": queries if wanted.kind == CROSS else []}


def _units(
    groups: Sequence[list[int]], tokens: EncodedText, model: ServedModel
) -> list[inspection_pb2.AttentionUnit]:
    return [_unit(group, tokens, model) for group in groups]


def _unit(places: list[int], tokens: EncodedText, model: ServedModel) -> inspection_pb2.AttentionUnit:
    ids = [tokens.token_ids[place] for place in places]
    return inspection_pb2.AttentionUnit(
        token_ids=ids,
        token=b"".join(model.tokenizer.token_bytes(token_id) for token_id in ids),
        start=tokens.offsets[places[0]][0],
        end=tokens.offsets[places[-1]][1],
        text=tokens.texts[places[0]] or 0,
    )
