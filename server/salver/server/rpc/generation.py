"""GenerationService: Generate, StreamGenerate, Chat and StreamChat take one path; Score another."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc

from salver.server.admission import Admission
from salver.server.engine.outputs import CompletionDelta, GenerationStream, GenerationUpdate
from salver.server.engine.request import NO_DEADLINE, EngineRequest, Logprobs
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.prompts import PromptReader, template_of
from salver.server.rpc.scoring import score
from salver.server.rpc.served import Front, RequestLimits, ServedModel, Task
from salver.server.rpc.submission import Submissions, next_request_id
from salver.server.rpc.validation import (
    GenerationParams,
    Violations,
    check_generation,
    check_messages,
    check_model,
    check_prompt,
    room,
    stopping_of,
)
from salver.v1 import common_pb2, generation_pb2, generation_pb2_grpc

_Response = TypeVar("_Response")
_NO_DEADLINE_SECONDS = 1e8  # gRPC's "infinite" comes as a date far away
_MAX_SEED_BITS = 63


def deadline_of(context: grpc.aio.ServicerContext, arrival: float) -> float:
    """The call's deadline on the monotonic clock."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _NO_DEADLINE_SECONDS:
        return NO_DEADLINE
    return arrival + float(remaining)


@dataclass(slots=True)
class _Generation:
    """One call on its way."""

    request_id: str
    model: ServedModel
    engine_request: EngineRequest
    stream: GenerationStream

    def response(self, kind: Callable[..., _Response], deltas: list[CompletionDelta]) -> _Response:
        tokenizer = self.model.tokenizer
        return kind(
            request_id=self.request_id,
            model=self.model.name,
            completions=[convert.completion(delta, tokenizer) for delta in deltas],
            seed=self.engine_request.sampling.seed,
            numerics_id=self.model.ready.numerics_id,
        )

    def add_prompt(self, response: Any, logprobs: list[Logprobs]) -> None:
        """What the first message says of the prompt."""
        ids = self.engine_request.prompt_token_ids
        response.prompt_token_ids.extend(ids)
        if self.engine_request.prompt_top_k is not None:
            response.prompt_logprobs.extend(convert.prompt_logprobs(ids, logprobs, self.model.tokenizer))

    def add_usage(self, response: Any, total: float) -> None:
        """What the last message says."""
        response.usage.CopyFrom(
            common_pb2.Usage(
                prompt_tokens=len(self.engine_request.prompt_token_ids),
                completion_tokens=self.stream.completion_tokens,
                cached_tokens=self.stream.cached_tokens,
                resumed_tokens=self.stream.resumed_tokens,
            )
        )
        response.timings.CopyFrom(convert.timings(self.stream.timings, total))


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with generated text."""

    def __init__(self, front: Front, admission: Admission, metrics: Metrics, prompts: PromptReader) -> None:
        self._front = front
        self._admission = admission
        self._metrics = metrics
        self._prompts = prompts

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        return await self._answer(request, context, generation_pb2.GenerateResponse)

    async def StreamGenerate(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await self._stream(request, context, generation_pb2.StreamGenerateResponse)

    async def Chat(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        return await self._answer(request, context, generation_pb2.ChatResponse)

    async def StreamChat(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await self._stream(request, context, generation_pb2.StreamChatResponse)

    async def Score(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        arrival = time.monotonic()
        return await score(
            request, self._front, self._admission, self._metrics, self._prompts,
            arrival=arrival, deadline=deadline_of(context, arrival),
        )  # fmt: skip

    async def _answer(
        self, request: Any, context: grpc.aio.ServicerContext, kind: Callable[..., _Response]
    ) -> _Response:
        async with self._generation(request, context) as generation:
            update = await generation.stream.collect()
            # In order of their index, whichever ended first.
            response = generation.response(kind, sorted(update.deltas, key=lambda delta: delta.index))
            generation.add_prompt(response, update.prompt_logprobs)
            generation.add_usage(response, self._finished(generation, update))
            return response

    async def _stream(
        self, request: Any, context: grpc.aio.ServicerContext, kind: Callable[..., Any]
    ) -> None:
        async with self._generation(request, context) as generation:
            wanted = 0
            if generation.engine_request.prompt_top_k is not None:
                wanted = len(generation.engine_request.prompt_token_ids) - 1
            prompt: list[Logprobs] = []
            held: list[CompletionDelta] = []
            first = True
            async for update in generation.stream:
                # The prompt's log-probabilities come in chunks and go out whole, in the first message.
                # A sample held for them was complete when it was resumed, so it comes only once.
                prompt += update.prompt_logprobs
                held += update.deltas
                if not update.finished and (not held or len(prompt) < wanted):
                    continue
                response = generation.response(kind, held)
                held = []
                if first:
                    first = False
                    generation.add_prompt(response, prompt)
                    prompt, wanted = [], 0
                if update.finished:
                    generation.add_usage(response, self._finished(generation, update, streamed=True))
                else:
                    self._count_ended(update)
                await context.write(response)

    def _finished(
        self, generation: _Generation, update: GenerationUpdate, *, streamed: bool = False
    ) -> float:
        """Tells the metrics; seconds from arrival to now."""
        total = time.monotonic() - generation.engine_request.arrival
        self._count_ended(update)
        self._metrics.request_ended(generation.stream.timings, total)
        return total

    def _count_ended(self, update: GenerationUpdate) -> None:
        for delta in update.deltas:
            if delta.finish_reason is not None:
                self._metrics.succeeded(delta.finish_reason.value)

    @asynccontextmanager
    async def _generation(
        self, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_Generation]:
        """Checks, admits, tokenizes and submits a request; whatever happens then, nothing of it stays."""
        arrival = time.monotonic()
        deadline = deadline_of(context, arrival)
        model = self._front.model
        check_model(request.model, model)
        model.require(Task.GENERATE)
        params, read_prompt = self._checked(request, model)
        permit = self._admission.admit()
        try:
            token_ids = await read_prompt()
            engine_request = _engine_request(params, token_ids, model, arrival=arrival, deadline=deadline)
            permit.add_tokens(len(token_ids))
            stream = GenerationStream(
                Submissions(self._front.engine, self._metrics, permit),
                engine_request,
                model.tokenizer,
                stop=params.stop,
                include_stop=params.include_stop,
                eos_token_ids=frozenset() if params.ignore_eos else frozenset(model.tokenizer.eos_token_ids),
            )
            try:
                with self._front.running(stream):
                    stream.start()
                    yield _Generation(request.request_id, model, engine_request, stream)
            finally:
                stream.close()
        finally:
            permit.release()

    def _checked(
        self, request: Any, model: ServedModel
    ) -> tuple[GenerationParams, Callable[[], Awaitable[tuple[int, ...]]]]:
        """The parameters, and how to read the prompt. Raises ApiError for everything that is wrong."""
        violations = Violations()
        if hasattr(request, "messages"):
            template_of(model)
            check_messages(request.messages, "messages", violations)
            going_on = request.continue_final_message
            asks = (
                request.add_generation_prompt if request.HasField("add_generation_prompt") else not going_on
            )
            if asks and going_on:
                violations.add("add_generation_prompt", "cannot be set together with continue_final_message")

            def read_prompt() -> Awaitable[tuple[int, ...]]:
                return self._prompts.conversation(
                    request.messages, model, add_generation_prompt=asks, continue_final_message=going_on,
                    template_kwargs=request.template_kwargs if request.HasField("template_kwargs") else None,
                )  # fmt: skip
        else:
            check_prompt(request.prompt, "prompt", model.limits.vocab_size, violations)

            def read_prompt() -> Awaitable[tuple[int, ...]]:
                return self._prompts.prompt(request.prompt, model)

        params = check_generation(request, model, violations)
        violations.raise_any()
        return params, read_prompt


def _engine_request(
    params: GenerationParams,
    token_ids: tuple[int, ...],
    model: ServedModel,
    *,
    arrival: float,
    deadline: float,
) -> EngineRequest:
    """Raises ApiError when the tokens show that the request cannot be served."""
    if params.resumed_prompt is not None and params.resumed_prompt != token_ids:
        raise invalid_argument(
            [Violation("resume.prompt_token_ids", "are not the ids of this request's prompt")]
        )
    max_tokens = room(len(token_ids), params.max_tokens, model.limits)
    _check_fits(params, len(token_ids), max_tokens, model.limits)
    seed = params.seed if params.seed is not None else secrets.randbits(_MAX_SEED_BITS) or 1
    indices = tuple(range(params.n))
    return EngineRequest(
        request_id=next_request_id(),
        prompt_token_ids=token_ids,
        sampling=replace(params.sampling, seed=seed),
        stopping=stopping_of(params, max_tokens, model.tokenizer.eos_token_ids),
        sample_indices=indices,
        outputs=tuple(params.resumed.get(index, ()) for index in indices),
        output_top_k=params.output_top_k,
        prompt_top_k=params.prompt_top_k,
        priority=params.priority,
        deadline=deadline,
        arrival=arrival,
        cache_salt=params.cache_salt,
    )


def _check_fits(params: GenerationParams, prompt_tokens: int, max_tokens: int, limits: RequestLimits) -> None:
    """With max_tokens unset, what was asked for otherwise must fit what is left of the context."""
    resumed = max((len(ids) for ids in params.resumed.values()), default=0)
    for name, count in (("min_tokens", params.min_tokens), ("resumed tokens", resumed)):
        if count > max_tokens:
            raise out_of_range(
                f"{name} ({count}) and the prompt ({prompt_tokens} tokens) exceed the {limits.capacity} "
                "tokens that a request may have",
                prompt_tokens=prompt_tokens,
                max_model_len=limits.max_model_len,
                kv_cache_tokens=limits.cache_tokens,
            )
