"""InspectionService: a look inside the model, through the engine's queue like any request."""

from __future__ import annotations

import time
from typing import Any

import grpc

from salver.model.tokenizer.encoding import EncodedText
from salver.server.admission import Admission
from salver.server.engine.request import EncodingParams, Readout
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.configuration import Configuration
from salver.server.rpc.encoding_call import Arrays, Computed, EncodingCall, NextToken
from salver.server.rpc.generation import deadline_of
from salver.server.rpc.model_card import model_card
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.validation import (
    Violations,
    check_next_token,
    check_priority,
    check_prompt,
    check_request_id,
    check_score_length,
    check_token_ids,
    model_named,
)
from salver.v1 import common_pb2, inspection_pb2, inspection_pb2_grpc

MAX_CANDIDATES = 1000
DEFAULT_CANDIDATES = 10


class InspectionService(inspection_pb2_grpc.InspectionServiceServicer):
    """Shows what a model's answers are made of."""

    def __init__(self, front: Front, admission: Admission, metrics: Metrics, reader: PromptReader) -> None:
        self._front = front
        self._admission = admission
        self._metrics = metrics
        self._reader = reader

    async def GetDistribution(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        arrival = time.monotonic()
        model = model_named(request.model, self._front.model)
        model.require(Task.GENERATE)
        violations = Violations()
        check_request_id(request.request_id, violations)
        limits = model.limits
        check_prompt(request.prompt, "prompt", limits.vocab_size, violations)
        check_token_ids(request.output_token_ids, "output_token_ids", limits.vocab_size, violations)
        configuration, sampling, stopping = check_next_token(request, model, violations)
        count = request.num_candidates if request.HasField("num_candidates") else DEFAULT_CANDIDATES
        if not 1 <= count <= MAX_CANDIDATES:
            violations.add("num_candidates", f"{count} must be between 1 and {MAX_CANDIDATES}")
        with self._call(request, context, violations, model, arrival) as call:
            ids = await self._reader.prompt(request.prompt, model)
            sampling = await self._reader.with_words(configuration.sampling, sampling, model)
            output = tuple(request.output_token_ids)
            check_score_length(len(ids) + len(output), "the prompt with output_token_ids", limits)
            params = EncodingParams(Readout.DISTRIBUTION, top_k=min(count, limits.vocab_size))
            computed = await call.compute(
                [EncodedText.of_ids(ids)], [params], NextToken(sampling, stopping, output)
            )
        return self._response(
            inspection_pb2.GetDistributionResponse, request, model, computed, arrival,
            steps=_steps(computed.arrays[0], model), configuration=_said(configuration),
        )  # fmt: skip

    async def GetModelCard(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        base = self._front.model
        return model_card(request, model_named(request.model, base), base, self._admission.forecast.times)

    def _call(
        self,
        request: Any,
        context: grpc.aio.ServicerContext,
        violations: Violations,
        model: ServedModel,
        arrival: float,
    ) -> EncodingCall:
        """Admits the call. Raises ApiError: also for the violations found so far."""
        priority = check_priority(request, violations)
        violations.raise_any()
        return EncodingCall(
            self._front, self._admission, self._metrics, 1,
            arrival=arrival, deadline=deadline_of(context, arrival), priority=priority,
            adapter=model.adapter,
        )  # fmt: skip

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
