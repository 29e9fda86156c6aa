"""EncodingService: vectors, labels, spans and words, each method a few lines over one path."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from salver.model.pooling import normalized
from salver.model.tokenizer.encoding import EncodedText
from salver.server.admission import Admission
from salver.server.engine.request import Readout
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.encoding_call import Computed, EncodingCall, encoding_params, fitted
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.generation import deadline_of
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.validation import (
    Violations,
    check_priority,
    check_prompt,
    check_request_id,
    model_named,
)
from salver.server.tasks.answers import best_answers, windows
from salver.server.tasks.scores import Activation, activated, activation_of, ranked
from salver.server.tasks.spans import OUTSIDE, Aggregation, labelled_spans
from salver.v1 import common_pb2, encoding_pb2, encoding_pb2_grpc

MAX_TOP_K = 1000
MAX_TARGETS = 1000
DEFAULT_CANDIDATES = 5
DEFAULT_ANSWER_TOKENS = 15
DEFAULT_STRIDE = 128

_POOLING = {
    encoding_pb2.POOLING_CLS: "cls",
    encoding_pb2.POOLING_MEAN: "mean",
    encoding_pb2.POOLING_MAX: "max",
    encoding_pb2.POOLING_LAST_TOKEN: "lasttoken",
    encoding_pb2.POOLING_WEIGHTED_MEAN: "weightedmean",
}
_ACTIVATIONS = {
    encoding_pb2.ACTIVATION_IDENTITY: Activation.IDENTITY,
    encoding_pb2.ACTIVATION_SIGMOID: Activation.SIGMOID,
    encoding_pb2.ACTIVATION_SOFTMAX: Activation.SOFTMAX,
}
_AGGREGATIONS = {
    encoding_pb2.AGGREGATION_UNSPECIFIED: Aggregation.NONE,
    encoding_pb2.AGGREGATION_NONE: Aggregation.NONE,
    encoding_pb2.AGGREGATION_SIMPLE: Aggregation.SIMPLE,
    encoding_pb2.AGGREGATION_FIRST: Aggregation.FIRST,
    encoding_pb2.AGGREGATION_AVERAGE: Aggregation.AVERAGE,
    encoding_pb2.AGGREGATION_MAX: Aggregation.MAX,
}


class EncodingService(encoding_pb2_grpc.EncodingServiceServicer):
    """What a checkpoint understands of texts."""

    def __init__(self, front: Front, admission: Admission, metrics: Metrics, reader: PromptReader) -> None:
        self._front = front
        self._admission = admission
        self._metrics = metrics
        self._reader = reader

    # --- the methods -------------------------------------------------------------------

    async def Embed(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.EMBED)
        violations = self._common(request, "inputs", model)
        for position, prompt in enumerate(request.inputs):
            check_prompt(prompt, f"inputs[{position}]", model.limits.vocab_size, violations)
        pooling = _check_embed(request, model, violations)
        with self._call(request, context, violations, len(request.inputs), arrival) as call:
            spec = model.embedding
            prefix = "" if request.per_token else _prefix(request, model)

            def tokenize() -> list[EncodedText]:
                return [_embedded(prompt, prefix, model) for prompt in request.inputs]

            size = sum(len(prompt.text) for prompt in request.inputs)
            found = await self._tokens(size, tokenize, request.truncate, model, spec.max_tokens)
            readout = Readout.TOKENS if request.per_token else Readout.EMBEDDING
            params = [encoding_params(model, readout, tokens, pooling=pooling) for tokens in found]
            computed = await call.compute(found, params)
        embeddings = [
            _token_embeddings(tokens, arrays[0], model)
            if request.per_token
            else _embedding(request, tokens, arrays[0], model)
            for tokens, arrays in zip(found, computed.arrays, strict=True)
        ]
        return self._response(
            encoding_pb2.EmbedResponse, request, model, computed, arrival, embeddings=embeddings
        )

    async def Rerank(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.RERANK)
        violations = self._common(request, "documents", model)
        _check_texts(request.documents, "documents", violations)
        if not request.query:
            violations.add("query", "must not be empty")
        count = _check_count(request, "top_n", len(request.documents) or 1, None, violations)
        with self._call(request, context, violations, len(request.documents), arrival) as call:
            pairs = [(request.query, document) for document in request.documents]
            found, computed = await self._scored(call, pairs, request.truncate, model, "documents")
        logits = np.concatenate([arrays[0] for arrays in computed.arrays])
        raw = request.raw_scores or model.rank_activation == "identity"
        scores = activated(logits, Activation.IDENTITY if raw else Activation.SIGMOID)
        results = [
            encoding_pb2.RankedDocument(
                index=index,
                score=scores[index],
                document=request.documents[index] if request.return_documents else "",
                truncated_tokens=found[index].truncated,
            )
            for index in ranked(logits, count)
        ]
        return self._response(encoding_pb2.RerankResponse, request, model, computed, arrival, results=results)

    async def Classify(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.CLASSIFY)
        violations = self._common(request, "inputs", model)
        for position, item in enumerate(request.inputs):
            if not item.text:
                violations.add(f"inputs[{position}].text", "must not be empty")
        count = _check_count(request, "top_k", MAX_TOP_K, None, violations)
        activation = _ACTIVATIONS.get(request.activation) or activation_of(
            model.problem_type, len(model.labels)
        )
        if request.activation and request.activation not in _ACTIVATIONS:
            violations.add("activation", f"{request.activation} is not an activation")
        with self._call(request, context, violations, len(request.inputs), arrival) as call:
            pairs = [(item.text, item.pair if item.HasField("pair") else None) for item in request.inputs]
            found, computed = await self._scored(call, pairs, request.truncate, model, "inputs")
        results = []
        for tokens, arrays in zip(found, computed.arrays, strict=True):
            scores = activated(arrays[0], activation)
            labels = [
                encoding_pb2.LabelScore(label=model.labels[i], score=scores[i])
                for i in ranked(arrays[0], count)
            ]
            results.append(
                encoding_pb2.Classification(
                    labels=labels, num_tokens=len(tokens), truncated_tokens=tokens.truncated
                )
            )
        name = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[activation]
        return self._response(
            encoding_pb2.ClassifyResponse, request, model, computed, arrival, results=results, activation=name
        )

    async def ClassifyTokens(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.CLASSIFY_TOKENS)
        violations = self._common(request, "inputs", model)
        _check_texts(request.inputs, "inputs", violations)
        aggregation = _AGGREGATIONS.get(request.aggregation, Aggregation.NONE)
        if request.aggregation not in _AGGREGATIONS:
            violations.add("aggregation", f"{request.aggregation} is not an aggregation")
        with self._call(request, context, violations, len(request.inputs), arrival) as call:
            pairs = [(text, None) for text in request.inputs]
            found, computed = await self._scored(call, pairs, request.truncate, model, "inputs")
        results = []
        for text, tokens, arrays in zip(request.inputs, found, computed.arrays, strict=True):
            scores = activated(arrays[0], Activation.SOFTMAX)
            spans = labelled_spans(tokens, scores, model.labels, aggregation)
            results.append(
                encoding_pb2.TokenClassification(
                    spans=[
                        encoding_pb2.LabelledSpan(
                            label=s.label, score=s.score, text=text[s.start : s.end], start=s.start, end=s.end
                        )
                        for s in spans
                        if s.label != OUTSIDE or request.include_outside
                    ],
                    num_tokens=len(tokens),
                    truncated_tokens=tokens.truncated,
                )
            )
        return self._response(
            encoding_pb2.ClassifyTokensResponse, request, model, computed, arrival, results=results
        )

    async def FillMask(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.FILL_MASK)
        violations = self._common(request, "inputs", model)
        _check_texts(request.inputs, "inputs", violations)
        count = _check_count(
            request, "top_k", min(MAX_TOP_K, model.limits.vocab_size), DEFAULT_CANDIDATES, violations
        )
        targets = _check_targets(request, model, violations)
        with self._call(request, context, violations, len(request.inputs), arrival) as call:

            def tokenize() -> list[EncodedText]:
                return [model.tokenizer.encode_input(text) for text in request.inputs]

            size = sum(map(len, request.inputs))
            found = await self._tokens(size, tokenize, request.truncate, model)
            places = [_masks(tokens, f"inputs[{i}]", model) for i, tokens in enumerate(found)]
            top_k = 0 if targets else count or 0
            params = [
                encoding_params(
                    model, Readout.CANDIDATES, tokens, positions=tuple(masks), top_k=top_k, targets=targets
                )
                for tokens, masks in zip(found, places, strict=True)
            ]
            computed = await call.compute(found, params)
        results = [
            encoding_pb2.MaskFilling(
                masks=_filled(tokens, masks, arrays, targets, model),
                num_tokens=len(tokens),
                truncated_tokens=tokens.truncated,
            )
            for tokens, masks, arrays in zip(found, places, computed.arrays, strict=True)
        ]
        return self._response(
            encoding_pb2.FillMaskResponse, request, model, computed, arrival, results=results
        )

    async def ExtractAnswer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.EXTRACT_ANSWER)
        violations = Violations()
        check_request_id(request.request_id, violations)
        for field in ("question", "context"):
            if not getattr(request, field).strip():
                violations.add(field, "must not be empty")
        limit = model.limits.max_model_len
        count = _check_count(request, "top_k", MAX_TOP_K, 1, violations) or 1
        longest = _check_count(request, "max_answer_tokens", limit, DEFAULT_ANSWER_TOKENS, violations) or 1
        stride = request.stride if request.HasField("stride") else min(DEFAULT_STRIDE, limit // 2)
        with self._call(request, context, violations, 1, arrival) as call:
            size = len(request.question) + len(request.context)
            tokens = await self._reader.run(
                size, lambda: model.tokenizer.encode_input(request.question, request.context)
            )
            if 1 not in tokens.texts:
                raise invalid_argument([Violation("context", "tokenizes to nothing")])
            try:
                parts = windows(tokens, limit, stride)
            except ValueError as error:
                raise out_of_range(str(error), max_input_tokens=limit, stride=stride) from error
            computed = await call.compute(
                parts, [encoding_params(model, Readout.SCORES, part) for part in parts]
            )

        def find() -> list[Any]:
            return best_answers(
                parts, [arrays[0] for arrays in computed.arrays],
                count=count, max_tokens=longest, allow_no_answer=request.allow_no_answer,
            )  # fmt: skip

        found = await self._reader.run(len(parts) * limit * limit // 16, find)
        answers = [
            encoding_pb2.Answer(
                text=request.context[a.start : a.end],
                start=a.start,
                end=a.end,
                score=a.score,
                no_answer=a.no_answer,
            )
            for a in found
        ]
        return self._response(
            encoding_pb2.ExtractAnswerResponse, request, model, computed, arrival,
            answers=answers, windows=len(parts),
        )  # fmt: skip

    # --- what they share ---------------------------------------------------------------

    def _begin(self, request: Any, task: Task) -> tuple[ServedModel, float]:
        model = model_named(request.model, self._front.model)
        model.require(task)
        return model, time.monotonic()

    def _common(self, request: Any, field: str, model: ServedModel) -> Violations:
        """Checks the list of inputs and the request's id."""
        violations = Violations()
        check_request_id(request.request_id, violations)
        count, most = len(getattr(request, field)), model.limits.max_queued_requests
        if count == 0:
            violations.add(field, "must not be empty")
        elif count > most:
            violations.add(field, f"are {count}; at most {most} in one call, the length of the queue")
            violations.raise_any()  # not a word about each of them
        return violations

    def _call(
        self,
        request: Any,
        context: grpc.aio.ServicerContext,
        violations: Violations,
        num_inputs: int,
        arrival: float,
    ) -> EncodingCall:
        """Admits the call. Raises ApiError: also for the violations found so far."""
        priority = check_priority(request, violations)
        violations.raise_any()
        return EncodingCall(
            self._front, self._admission, self._metrics, num_inputs,
            arrival=arrival, deadline=deadline_of(context, arrival), priority=priority,
            adapter=model_named(request.model, self._front.model).adapter,
        )  # fmt: skip

    async def _tokens(
        self,
        size: int,
        tokenize: Callable[[], list[EncodedText]],
        truncate: bool,
        model: ServedModel,
        max_tokens: int | None = None,
        field: str = "inputs",
    ) -> list[EncodedText]:
        """The inputs, each no longer than the model reads. Raises ApiError."""
        limit = min(model.limits.capacity, max_tokens or model.limits.capacity)
        found = await self._reader.run(size, tokenize)
        violations = Violations()
        for position, tokens in enumerate(found):
            if not tokens.token_ids:
                violations.add(f"{field}[{position}]", "tokenizes to nothing")
        violations.raise_any()
        return [fitted(tokens, limit, f"{field}[{i}]", truncate, model) for i, tokens in enumerate(found)]

    async def _scored(
        self,
        call: EncodingCall,
        texts: Sequence[tuple[str, str | None]],
        truncate: bool,
        model: ServedModel,
        field: str,
    ) -> tuple[list[EncodedText], Computed]:
        """The head's scores of texts and pairs."""

        def tokenize() -> list[EncodedText]:
            return [model.tokenizer.encode_input(text, pair) for text, pair in texts]

        size = sum(len(text) + len(pair or "") for text, pair in texts)
        found = await self._tokens(size, tokenize, truncate, model, field=field)
        return found, await call.compute(
            found, [encoding_params(model, Readout.SCORES, item) for item in found]
        )

    def _response(
        self, kind: Any, request: Any, model: ServedModel, computed: Computed, arrival: float, **fields: Any
    ) -> Any:
        return kind(
            request_id=request.request_id,
            model=model.name,
            usage=common_pb2.Usage(prompt_tokens=computed.num_tokens),
            timings=convert.timings(computed.timings, time.monotonic() - arrival),
            numerics_id=model.ready.numerics_id,
            **fields,
        )


def _check_texts(texts: Sequence[str], field: str, violations: Violations) -> None:
    for position, text in enumerate(texts):
        if not text:
            violations.add(f"{field}[{position}]", "must not be empty")


def _check_count(
    request: Any, field: str, most: int, default: int | None, violations: Violations
) -> int | None:
    """An optional number from 1 to `most`."""
    if not request.HasField(field):
        return default
    value = int(getattr(request, field))
    if not 1 <= value <= most:
        violations.add(field, f"{value} must be between 1 and {most}")
    return value


# --- Embed ---


def _check_embed(request: Any, model: ServedModel, violations: Violations) -> tuple[str, ...]:
    """The pooling to use."""
    spec = model.embedding
    pooling = spec.pooling
    if request.pooling:
        if request.pooling not in _POOLING:
            violations.add("pooling", f"{request.pooling} is not a pooling")
        elif spec.dense:
            violations.add("pooling", "cannot be chosen: the checkpoint's dense modules want its own")
        else:
            pooling = (_POOLING[request.pooling],)
    if request.per_token:
        for field in ("dimensions", "normalize", "prompt_name"):
            if request.HasField(field):
                violations.add(field, "does nothing with per_token")
        if request.pooling:
            violations.add("pooling", "does nothing with per_token")
    elif request.HasField("dimensions"):
        most = model.embedding_dimensions
        if spec.dense or not request.pooling:
            _check_count(request, "dimensions", most, None, violations)
        else:
            _check_count(request, "dimensions", most // len(spec.pooling), None, violations)
    if request.HasField("prompt_name") and request.prompt_name not in {"", *spec.prompts}:
        names = ", ".join(sorted(spec.prompts)) or "none"
        violations.add("prompt_name", f"{request.prompt_name!r} is not one of the checkpoint's ({names})")
    return pooling


def _prefix(request: Any, model: ServedModel) -> str:
    spec = model.embedding
    name = request.prompt_name if request.HasField("prompt_name") else spec.default_prompt_name
    return spec.prompts[name] if name else ""


def _embedded(prompt: common_pb2.Prompt, prefix: str, model: ServedModel) -> EncodedText:
    """Of text with its prompt and special tokens, or of token ids as they are."""
    if prompt.WhichOneof("prompt") == "token_ids":
        return EncodedText.of_ids(prompt.token_ids.ids)
    text = prefix + prompt.text
    return model.tokenizer.encode_input(text.lower() if model.embedding.lower_case else text)


def _embedding(request: Any, tokens: EncodedText, vector: Any, model: ServedModel) -> encoding_pb2.Embedding:
    normalize = request.normalize if request.HasField("normalize") else model.embedding.normalize
    if request.HasField("dimensions"):
        vector = vector[: request.dimensions]
    if normalize:
        vector = normalized(vector)
    return encoding_pb2.Embedding(
        values=vector.tolist(), num_tokens=len(tokens), truncated_tokens=tokens.truncated
    )


def _token_embeddings(tokens: EncodedText, rows: Any, model: ServedModel) -> encoding_pb2.Embedding:
    return encoding_pb2.Embedding(
        tokens=[
            encoding_pb2.TokenEmbedding(
                token_id=token_id,
                token=model.tokenizer.token_bytes(token_id),
                start=start,
                end=end,
                values=row.tolist(),
            )
            for token_id, (start, end), row in zip(tokens.token_ids, tokens.offsets, rows, strict=True)
        ],
        num_tokens=len(tokens),
        truncated_tokens=tokens.truncated,
    )


# --- FillMask ---


def _check_targets(request: Any, model: ServedModel, violations: Violations) -> tuple[int, ...]:
    if request.targets and request.HasField("top_k"):
        violations.add("top_k", "does nothing beside targets")
    if len(request.targets) > MAX_TARGETS:
        violations.add("targets", f"must be at most {MAX_TARGETS}")
        return ()
    found = []
    for position, target in enumerate(request.targets):
        token_id = model.tokenizer.token_to_id(target)
        if token_id is None:
            violations.add(f"targets[{position}]", f"{target!r} is not a token of the vocabulary")
        else:
            found.append(token_id)
    return tuple(found)


def _masks(tokens: EncodedText, field: str, model: ServedModel) -> list[int]:
    """Where the mask tokens are. Raises ApiError where there is none."""
    mask = model.tokenizer.mask_token_id
    places = [i for i, token_id in enumerate(tokens.token_ids) if token_id == mask]
    if mask is None or not places:
        spelled = model.tokenizer.token(mask) if mask is not None else None
        problem = f"holds no mask token ({spelled})" if spelled else "the tokenizer has no mask token"
        if tokens.truncated:
            problem += f" among the tokens that truncation left ({len(tokens)})"
        raise invalid_argument([Violation(field, problem)])
    return places


def _filled(
    tokens: EncodedText, masks: list[int], arrays: Any, targets: tuple[int, ...], model: ServedModel
) -> list[encoding_pb2.FilledMask]:
    ids, logprobs, of_targets = arrays
    found = []
    for row, place in enumerate(masks):
        if targets:
            order = ranked(of_targets[row])
            pairs = [(targets[i], float(of_targets[row][i])) for i in order]
        else:
            pairs = [(int(i), float(p)) for i, p in zip(ids[row], logprobs[row], strict=True)]
        start, end = tokens.offsets[place]
        candidates = [
            encoding_pb2.MaskCandidate(
                token_id=token_id, token=model.tokenizer.token(token_id) or "", probability=np.exp(logprob)
            )
            for token_id, logprob in pairs
        ]
        found.append(encoding_pb2.FilledMask(start=start, end=end, candidates=candidates))
    return found
