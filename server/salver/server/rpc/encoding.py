"""EncodingService: vectors, labels, spans and words, each method a few lines over one path."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from salver.model.tokenizer.encoding import EncodedText
from salver.server.engine.request import Readout
from salver.server.rpc.encoding_call import Computed, EncodingCall, EngineCalls, encoding_params, fitted
from salver.server.rpc.encoding_messages import (
    check_count,
    check_embed,
    check_pair,
    check_targets,
    check_texts,
    embedded,
    embedding,
    filled_masks,
    mask_places,
    prompt_prefix,
    token_embeddings,
)
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.served import ServedModel, Task
from salver.server.rpc.validation import (
    Violations,
    check_prompt,
    check_request_id,
    model_named,
)
from salver.server.tasks.answers import best_answers, windows
from salver.server.tasks.scores import Activation, activated, activation_of, ranked
from salver.server.tasks.spans import OUTSIDE, Aggregation, labelled_spans
from salver.v1 import encoding_pb2, encoding_pb2_grpc

MAX_TOP_K = 1000
DEFAULT_CANDIDATES = 5
DEFAULT_ANSWER_TOKENS = 15
DEFAULT_STRIDE = 128

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


class EncodingService(EngineCalls, encoding_pb2_grpc.EncodingServiceServicer):
    """What a checkpoint understands of texts."""

    # --- the methods -------------------------------------------------------------------

    async def Embed(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.EMBED)
        violations = self._common(request, "inputs", model)
        for position, prompt in enumerate(request.inputs):
            check_prompt(prompt, f"inputs[{position}]", model.limits.vocab_size, violations)
        pooling = check_embed(request, model, violations)
        with self._call(request, context, violations, model, arrival, len(request.inputs)) as call:
            spec = model.embedding
            prefix = "" if request.per_token else prompt_prefix(request, model)

            def tokenize() -> list[EncodedText]:
                return [embedded(prompt, prefix, model) for prompt in request.inputs]

            size = sum(len(prompt.text) for prompt in request.inputs)
            found = await self._tokens(size, tokenize, request.truncate, model, spec.max_tokens)
            readout = Readout.TOKENS if request.per_token else Readout.EMBEDDING
            params = [encoding_params(model, readout, tokens, pooling=pooling) for tokens in found]
            computed = await call.compute(found, params)
        embeddings = [
            token_embeddings(tokens, arrays[0], model)
            if request.per_token
            else embedding(request, tokens, arrays[0], model)
            for tokens, arrays in zip(found, computed.arrays, strict=True)
        ]
        return self._response(
            encoding_pb2.EmbedResponse, request, model, computed, arrival, embeddings=embeddings
        )

    async def Rerank(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model, arrival = self._begin(request, Task.RERANK)
        violations = self._common(request, "documents", model)
        check_texts(request.documents, "documents", violations)
        if not request.query:
            violations.add("query", "must not be empty")
        check_pair("documents", model, violations)
        count = check_count(request, "top_n", len(request.documents) or 1, None, violations)
        with self._call(request, context, violations, model, arrival, len(request.documents)) as call:
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
            if item.HasField("pair"):
                check_pair(f"inputs[{position}].pair", model, violations)
        count = check_count(request, "top_k", MAX_TOP_K, None, violations)
        activation = _ACTIVATIONS.get(request.activation) or activation_of(
            model.problem_type, len(model.labels)
        )
        if request.activation and request.activation not in _ACTIVATIONS:
            violations.add("activation", f"{request.activation} is not an activation")
        with self._call(request, context, violations, model, arrival, len(request.inputs)) as call:
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
        check_texts(request.inputs, "inputs", violations)
        aggregation = _AGGREGATIONS.get(request.aggregation, Aggregation.NONE)
        if request.aggregation not in _AGGREGATIONS:
            violations.add("aggregation", f"{request.aggregation} is not an aggregation")
        with self._call(request, context, violations, model, arrival, len(request.inputs)) as call:
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
        check_texts(request.inputs, "inputs", violations)
        count = check_count(
            request, "top_k", min(MAX_TOP_K, model.limits.vocab_size), DEFAULT_CANDIDATES, violations
        )
        targets = check_targets(request, model, violations)
        with self._call(request, context, violations, model, arrival, len(request.inputs)) as call:

            def tokenize() -> list[EncodedText]:
                return [model.tokenizer.encode_input(text) for text in request.inputs]

            size = sum(map(len, request.inputs))
            found = await self._tokens(size, tokenize, request.truncate, model)
            places = [mask_places(tokens, f"inputs[{i}]", model) for i, tokens in enumerate(found)]
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
                masks=filled_masks(tokens, masks, arrays, targets, model),
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
        check_pair("context", model, violations)
        limit = model.limits.max_model_len
        count = check_count(request, "top_k", MAX_TOP_K, 1, violations) or 1
        longest = check_count(request, "max_answer_tokens", limit, DEFAULT_ANSWER_TOKENS, violations) or 1
        stride = request.stride if request.HasField("stride") else min(DEFAULT_STRIDE, limit // 2)
        with self._call(request, context, violations, model, arrival) as call:
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
