"""InspectionService: a look inside the model, through the engine's queue like any request."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from salver.model.tokenizer.encoding import EncodedText
from salver.server.admission import Admission
from salver.server.engine.request import EncodingParams, Readout
from salver.server.metrics import Metrics
from salver.server.rpc.attention import (
    attention_input,
    attention_parts,
    check_attention,
    check_size,
    read_texts,
)
from salver.server.rpc.configuration import Configuration
from salver.server.rpc.encoding_call import Arrays, EngineCalls, NextToken
from salver.server.rpc.generation import read_conversation
from salver.server.rpc.grammar import GrammarCompiler, check_followable, check_structured_output
from salver.server.rpc.model_card import model_card
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.sources import NO_SOURCE, check_languages, check_output, source_of
from salver.server.rpc.validation import (
    Violations,
    check_next_token,
    check_prompt,
    check_request_id,
    check_score_length,
    check_token_ids,
    model_named,
)
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
        check_languages(request, model, violations)
        count = request.num_candidates if request.HasField("num_candidates") else DEFAULT_CANDIDATES
        if not 1 <= count <= MAX_CANDIDATES:
            violations.add("num_candidates", f"{count} must be between 1 and {MAX_CANDIDATES}")
        if request.HasField("structured_output"):
            violations.found += check_structured_output(request) + check_followable(request, model)
        with self._call(request, context, violations, model, arrival) as call:
            ids = await read()
            sampling = await self._reader.with_words(configuration.sampling, sampling, model)
            output = tuple(request.output_token_ids)
            source = NO_SOURCE
            if model.source is None:
                check_score_length(len(ids) + len(output), "the prompt with output_token_ids", limits)
            else:
                source = source_of(request, ids, model)
                check_output(source, len(output), "prompt", "output_token_ids", model)
                ids = source.start
            grammar = ""
            if request.HasField("structured_output"):
                grammar = await self._grammars.compile(
                    request.structured_output, model, [output], outputs_field="output_token_ids"
                )
            params = EncodingParams(Readout.DISTRIBUTION, top_k=min(count, limits.vocab_size))
            computed = await call.compute(
                [EncodedText.of_ids(ids)], [params], NextToken(sampling, stopping, output, grammar), source
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
            check_prompt(request.prompt, "prompt", model.input_vocab_size, violations)
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
        wanted = check_attention(request, model, violations)
        with self._call(request, context, violations, model, arrival) as call:
            size = len(request.prompt.text) + len(request.pair) + len(request.target.text)
            texts = await self._reader.run(size, lambda: read_texts(request, wanted, model))
            check_size(texts, wanted, model)
            tokens, params = attention_input(texts, wanted, model)
            computed = await call.compute([tokens], [params], source=texts.source)
            weights = computed.arrays[0][0]
            parts = await self._reader.run(
                weights.size, lambda: attention_parts(request, texts, wanted, weights, model)
            )
        return self._response(
            inspection_pb2.GetAttentionResponse, request, model, computed, arrival, **parts,
            num_layers=wanted.num_layers, num_heads=wanted.num_heads, truncated_tokens=texts.truncated,
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
