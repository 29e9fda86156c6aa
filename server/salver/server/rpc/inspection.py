"""InspectionService: a look inside the model, through the engine's queue like any request."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from salver.model.tokenizer.encoding import EncodedText
from salver.server.admission import Admission
from salver.server.engine.request import EncodingParams, Readout
from salver.server.metrics import Metrics
from salver.server.rpc.configuration import Configuration
from salver.server.rpc.convert import add_floats
from salver.server.rpc.encoding_call import Arrays, EngineCalls, NextToken, encoding_params, fitted
from salver.server.rpc.encoding_messages import check_pair
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.generation import read_conversation
from salver.server.rpc.grammar import GrammarCompiler, check_followable, check_structured_output
from salver.server.rpc.model_card import model_card
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.validation import (
    Violations,
    check_next_token,
    check_prompt,
    check_request_id,
    check_score_length,
    check_token_ids,
    model_named,
)
from salver.server.tasks.attention import head_mean, merged, rollout, strongest, words_of
from salver.server.tasks.scores import Array
from salver.v1 import inspection_pb2, inspection_pb2_grpc

MAX_CANDIDATES = 1000
DEFAULT_CANDIDATES = 10


class InspectionService(EngineCalls, inspection_pb2_grpc.InspectionServiceServicer):
    """Shows what a model's answers are made of."""

    def __init__(
        self,
        front: Front,
        admission: Admission,
        metrics: Metrics,
        reader: PromptReader,
        grammars: GrammarCompiler,
    ) -> None:
        super().__init__(front, admission, metrics, reader)
        self._grammars = grammars

    async def GetDistribution(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        arrival = time.monotonic()
        model = model_named(request.model, self._front.model)
        model.require(Task.GENERATE)
        violations = Violations()
        check_request_id(request.request_id, violations)
        limits = model.limits
        read = self._reading(request, model, violations)
        check_token_ids(request.output_token_ids, "output_token_ids", limits.vocab_size, violations)
        configuration, sampling, stopping = check_next_token(request, model, violations)
        count = request.num_candidates if request.HasField("num_candidates") else DEFAULT_CANDIDATES
        if not 1 <= count <= MAX_CANDIDATES:
            violations.add("num_candidates", f"{count} must be between 1 and {MAX_CANDIDATES}")
        if request.HasField("structured_output"):
            violations.found += check_structured_output(request) + check_followable(request, model)
        with self._call(request, context, violations, model, arrival) as call:
            ids = await read()
            sampling = await self._reader.with_words(configuration.sampling, sampling, model)
            output = tuple(request.output_token_ids)
            check_score_length(len(ids) + len(output), "the prompt with output_token_ids", limits)
            grammar = ""
            if request.HasField("structured_output"):
                grammar = await self._grammars.compile(
                    request.structured_output, model, [output], outputs_field="output_token_ids"
                )
            params = EncodingParams(Readout.DISTRIBUTION, top_k=min(count, limits.vocab_size))
            computed = await call.compute(
                [EncodedText.of_ids(ids)], [params], NextToken(sampling, stopping, output, grammar)
            )
        return self._response(
            inspection_pb2.GetDistributionResponse, request, model, computed, arrival,
            steps=_steps(computed.arrays[0], model), configuration=_said(configuration),
        )  # fmt: skip

    def _reading(
        self, request: Any, model: ServedModel, violations: Violations
    ) -> Callable[[], Awaitable[tuple[int, ...]]]:
        """Checks the prompt or the conversation, whichever there is; how its ids are read."""
        if not request.messages:
            for name in ("add_generation_prompt", "continue_final_message", "template_kwargs"):
                if request.HasField(name):
                    violations.add(name, "needs messages")
            check_prompt(request.prompt, "prompt", model.limits.vocab_size, violations)
            return lambda: self._reader.prompt(request.prompt, model)
        if request.HasField("prompt"):
            violations.add("messages", "cannot be set together with a prompt")
        read = read_conversation(request, model, self._reader, violations)

        async def ids() -> tuple[int, ...]:
            return (await read())[1]

        return ids

    async def GetModelCard(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        base = self._front.model
        return model_card(request, model_named(request.model, base), base, self._admission.forecast.times)

    async def GetAttention(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        arrival = time.monotonic()
        model = model_named(request.model, self._front.model)
        violations = Violations()
        check_request_id(request.request_id, violations)
        check_prompt(request.prompt, "prompt", model.limits.vocab_size, violations)
        layers, heads = _check_attention(request, model, violations)
        with self._call(request, context, violations, model, arrival) as call:
            texts = (request.prompt.text, request.pair)
            tokens = await self._reader.run(sum(map(len, texts)), lambda: _tokens_of(request, model))
            if not tokens.token_ids:
                raise invalid_argument([Violation("prompt.text", "tokenizes to nothing")])
            tokens = fitted(tokens, model.limits.capacity, "prompt", request.truncate, model)
            is_rollout = request.view == inspection_pb2.ATTENTION_VIEW_ROLLOUT
            computing = tuple(range(layers[-1] + 1)) if is_rollout else layers
            _check_size(len(tokens), len(computing), len(heads), model)
            computed = await call.compute(
                [tokens], [encoding_params(model, Readout.ATTENTION, tokens, layers=computing, heads=heads)]
            )
            size = computed.arrays[0][0].size
            units, matrices = await self._reader.run(
                size, lambda: _attention(request, texts, tokens, computed.arrays[0][0], layers, heads, model)
            )
        return self._response(
            inspection_pb2.GetAttentionResponse, request, model, computed, arrival,
            units=units, matrices=matrices, num_layers=model.num_layers, num_heads=model.num_heads,
            truncated_tokens=tokens.truncated,
        )  # fmt: skip


def _steps(arrays: Arrays, model: ServedModel) -> list[inspection_pb2.StepDistribution]:
    names, token_ids, probabilities, counts, numbers = arrays
    return [
        inspection_pb2.StepDistribution(
            step=f"SAMPLING_STEP_{str(name).upper()}",
            candidates=[
                inspection_pb2.TokenProbability(
                    token_id=int(token_id),
                    token=model.tokenizer.token_bytes(int(token_id)),
                    probability=float(probability),
                )
                for token_id, probability in zip(token_ids[row], probabilities[row], strict=True)
                if token_id >= 0
            ],
            num_tokens=int(counts[row]),
            removed_mass=float(numbers[row][0]),
            entropy=float(numbers[row][1]),
        )
        for row, name in enumerate(names)
    ]


def _said(configuration: Configuration) -> Configuration:
    """Of the configuration in force, what decides about one token."""
    made = Configuration()
    made.CopyFrom(configuration)
    for part, names in (("sampling", ("n", "seed")), ("stopping", ("max_tokens", "stop", "include_stop"))):
        for name in names:
            getattr(made, part).ClearField(name)
            made.origins.pop(f"{part}.{name}", None)
    return made


# --- GetAttention ---


def _check_attention(
    request: Any, model: ServedModel, violations: Violations
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers and heads, in rising order."""
    chosen = []
    for name, count in (("layers", model.num_layers), ("heads", model.num_heads)):
        for position, index in enumerate(getattr(request, name)):
            if index >= count:
                violations.add(f"{name}[{position}]", f"{index} must be below {count}, the model's {name}")
                break
        chosen.append(tuple(sorted(set(getattr(request, name)))) or tuple(range(count)))
    if request.view not in inspection_pb2.AttentionView.values():
        violations.add("view", f"{request.view} is not a view")
    if request.view == inspection_pb2.ATTENTION_VIEW_ROLLOUT and request.heads:
        violations.add("heads", "cannot be chosen for a rollout, which is of all heads")
    if request.HasField("top_k") and request.top_k < 1:
        violations.add("top_k", "must be at least 1")
    if request.HasField("pair"):
        if model.encoder is None:
            violations.add("pair", f"{model.name!r} is a decoder, which reads one text")
        elif request.prompt.WhichOneof("prompt") == "token_ids":
            violations.add("pair", "needs a text beside it, not token ids")
        else:
            check_pair("pair", model, violations)
    if request.merge_words and request.prompt.WhichOneof("prompt") == "token_ids":
        violations.add("merge_words", "needs a text: token ids have no words")
    return chosen[0], chosen[1]


def _tokens_of(request: Any, model: ServedModel) -> EncodedText:
    if request.prompt.WhichOneof("prompt") == "token_ids":
        return EncodedText.of_ids(request.prompt.token_ids.ids)
    return model.tokenizer.encode_input(
        request.prompt.text, request.pair if request.HasField("pair") else None
    )


def _check_size(num_tokens: int, num_layers: int, num_heads: int, model: ServedModel) -> None:
    """Raises ApiError where the weights before any reduction are more than a message holds.

    It bounds the reply and also how long the step of the request's neighbours can take.
    """
    size, most = 4 * num_tokens**2 * num_layers * num_heads, model.limits.max_message_bytes
    room = most - most // 16  # for the units and the framing
    if size > room:
        fits = math.isqrt(room // (4 * num_layers * num_heads))
        raise out_of_range(
            f"the attention of {num_tokens} tokens in {num_layers} layers and {num_heads} heads is "
            f"{size} bytes, a message holds {most}: so many layers and heads of at most {fits} tokens fit; "
            "ask for fewer layers or heads, or a shorter text",
            prompt_tokens=num_tokens, layers=num_layers, heads=num_heads, max_tokens=fits,
        )  # fmt: skip


def _attention(
    request: Any,
    texts: tuple[str, str],
    tokens: EncodedText,
    weights: Array,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    model: ServedModel,
) -> tuple[list[inspection_pb2.AttentionUnit], list[inspection_pb2.AttentionMatrix]]:
    """The units, and the matrices of weights [layers computed, heads, n, n]."""
    of_heads: tuple[int | None, ...] = heads
    if request.view == inspection_pb2.ATTENTION_VIEW_ROLLOUT:
        weights, of_heads = rollout(weights)[list(layers)], (None,)
    elif request.view == inspection_pb2.ATTENTION_VIEW_HEAD_MEAN:
        weights, of_heads = head_mean(weights), (None,)
    groups = [[place] for place in range(len(tokens))]
    if request.merge_words:
        groups = words_of(texts, tokens)
        weights = merged(weights, groups)
    matrices = []
    for layer, of_layer in zip(layers, weights, strict=True):
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
    return [_unit(group, tokens, model) for group in groups], matrices


def _unit(places: list[int], tokens: EncodedText, model: ServedModel) -> inspection_pb2.AttentionUnit:
    ids = [tokens.token_ids[place] for place in places]
    return inspection_pb2.AttentionUnit(
        token_ids=ids,
        token=b"".join(model.tokenizer.token_bytes(token_id) for token_id in ids),
        start=tokens.offsets[places[0]][0],
        end=tokens.offsets[places[-1]][1],
        text=tokens.texts[places[0]] or 0,
    )
