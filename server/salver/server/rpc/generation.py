"""GenerationService: Generate, StreamGenerate, Chat and StreamChat take one path; Score another."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc

from salver.server.admission import Admission
from salver.server.engine.outputs import CompletionDelta, GenerationStream, GenerationUpdate
from salver.server.engine.request import NO_DEADLINE, EngineRequest, Logprobs
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.beams import limits_of_beams
from salver.server.rpc.configuration import Configuration
from salver.server.rpc.errors import Violation, invalid_argument, out_of_range
from salver.server.rpc.grammar import GrammarCompiler, check_followable, check_structured_output
from salver.server.rpc.prompts import PromptReader, template_of
from salver.server.rpc.scoring import score
from salver.server.rpc.served import Front, RequestLimits, ServedModel, Task
from salver.server.rpc.sources import Source, check_languages, room_beside, source_of
from salver.server.rpc.submission import Submissions, next_request_id
from salver.server.rpc.tools import (
    AnswerReader,
    check_calls,
    check_tools,
    grammar_of_calls,
    must_call,
    wants_reading,
)
from salver.server.rpc.validation import (
    GenerationParams,
    Violations,
    check_generation,
    check_messages,
    check_prompt,
    model_named,
    room_for,
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
    configuration: Configuration
    reader: AnswerReader | None
    longest: int = 0  # tokens of the longest sample that has ended

    def response(self, kind: Callable[..., _Response], deltas: list[CompletionDelta]) -> _Response:
        seed = self.engine_request.sampling.seed
        completions = [convert.completion(delta, self.model.tokenizer) for delta in deltas]
        if self.reader is not None:
            for completion in completions:
                self.reader.read(completion, seed)
        return kind(
            request_id=self.request_id,
            model=self.model.name,
            completions=completions,
            seed=seed,
            numerics_id=self.model.numerics_id,
            weights_version=self.model.in_force.version,
        )

    def add_prompt(self, response: Any, logprobs: list[Logprobs]) -> None:
        """What the first message says: the prompt, and the configuration in force."""
        response.configuration.CopyFrom(self.configuration)
        ids = self.engine_request.source_token_ids or self.engine_request.prompt_token_ids
        response.prompt_token_ids.extend(ids)
        if self.engine_request.prompt_top_k is not None:
            response.prompt_logprobs.extend(convert.prompt_logprobs(ids, logprobs, self.model.tokenizer))

    def add_usage(self, response: Any, total: float) -> None:
        """What the last message says."""
        response.usage.CopyFrom(
            common_pb2.Usage(
                prompt_tokens=self.engine_request.num_input_tokens,
                completion_tokens=self.stream.completion_tokens,
                cached_tokens=self.stream.cached_tokens,
                resumed_tokens=self.stream.resumed_tokens,
            )
        )
        response.timings.CopyFrom(convert.timings(self.stream.timings, total))
        explanation = self.stream.explain(self.engine_request.arrival + total)
        if explanation is not None:
            response.explanation.CopyFrom(convert.explanation(explanation, total))


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with generated text."""

    def __init__(
        self,
        front: Front,
        admission: Admission,
        metrics: Metrics,
        prompts: PromptReader,
        grammars: GrammarCompiler,
    ) -> None:
        self._front = front
        self._admission = admission
        self._metrics = metrics
        self._prompts = prompts
        self._grammars = grammars

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
            self._count_ended(generation, update)
            # In order of their index, whichever ended first.
            response = generation.response(kind, sorted(update.deltas, key=lambda delta: delta.index))
            generation.add_prompt(response, update.prompt_logprobs)
            generation.add_usage(response, self._finished(generation))
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
                self._count_ended(generation, update)
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
                    generation.add_usage(response, self._finished(generation))
                await context.write(response)

    def _finished(self, generation: _Generation) -> float:
        """Tells the metrics; seconds from arrival to now."""
        request = generation.engine_request
        total = time.monotonic() - request.arrival
        self._metrics.request_ended(generation.stream.timings, total, request.num_input_tokens)
        self._metrics.longest_sample(generation.longest)
        return total

    def _count_ended(self, generation: _Generation, update: GenerationUpdate) -> None:
        for delta in update.deltas:
            if delta.finish_reason is not None:
                length = delta.token_offset + len(delta.token_ids)
                generation.longest = max(generation.longest, length)
                self._metrics.succeeded(delta.finish_reason.value)
                self._metrics.sample_ended(length)

    @asynccontextmanager
    async def _generation(
        self, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_Generation]:
        """Checks, admits, tokenizes and submits a request; whatever happens then, nothing of it stays."""
        arrival = time.monotonic()
        deadline = deadline_of(context, arrival)
        model = model_named(request.model, self._front.model)
        model.require(Task.GENERATE)
        params, read_prompt = self._checked(request, model)
        permit = self._admission.admit()
        try:
            text, token_ids = await read_prompt()
            said = params.configuration.sampling
            sampling = await self._prompts.with_words(said, params.sampling, model)
            params = replace(params, sampling=sampling)
            source = None if model.source is None else source_of(request, token_ids, model)
            engine_request = _engine_request(
                params, token_ids, model, source, arrival=arrival, deadline=deadline
            )
            grammar = await self._grammar(request, model, engine_request.outputs)
            engine_request = replace(engine_request, grammar=grammar, explain=request.explain)
            reader = None
            if hasattr(request, "messages") and wants_reading(request):
                reader = AnswerReader(request, model, text, dict(params.resumed))
            permit.add_tokens(engine_request.num_input_tokens)
            permit.check_deadline((engine_request,))
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
                    yield _Generation(
                        request.request_id, model, engine_request, stream, _told(params, engine_request),
                        reader,
                    )  # fmt: skip
            finally:
                stream.close()
        finally:
            permit.release()

    async def _grammar(self, request: Any, model: ServedModel, outputs: tuple[tuple[int, ...], ...]) -> str:
        """What the output must follow, compiled; empty: nothing. Raises ApiError."""
        if request.HasField("structured_output"):
            return await self._grammars.compile(request.structured_output, model, outputs)
        if must_call(request):
            lark = grammar_of_calls(request, model)
            return await self._grammars.compile_form("grammar", lark, "tools", model, outputs)
        return ""

    def _checked(
        self, request: Any, model: ServedModel
    ) -> tuple[GenerationParams, Callable[[], Awaitable[tuple[str, tuple[int, ...]]]]]:
        """The parameters, and how to read the prompt: the conversation's text, if it is one, and the ids.

        Raises ApiError for everything that is wrong.
        """
        violations = Violations()
        if hasattr(request, "messages"):
            read_prompt = read_conversation(request, model, self._prompts, violations, tools=request.tools)
            violations.found += check_tools(request, model)
        else:
            check_prompt(request.prompt, "prompt", model.input_vocab_size, violations)

            async def read_prompt() -> tuple[str, tuple[int, ...]]:
                return "", await self._prompts.prompt(request.prompt, model)

        params = check_generation(request, model, violations)
        check_languages(request, model, violations)
        if model.source is not None and params.prompt_top_k is not None:
            violations.add("logprobs.prompt_top_k", "a source is read and not predicted")
        if request.HasField("structured_output"):
            violations.found += check_structured_output(request)
        if request.HasField("structured_output") or must_call(request):
            violations.found += check_followable(request, model)
        violations.raise_any()
        return params, read_prompt


def read_conversation(
    request: Any,
    model: ServedModel,
    prompts: PromptReader,
    violations: Violations,
    *,
    tools: Sequence[generation_pb2.Tool] = (),
) -> Callable[[], Awaitable[tuple[str, tuple[int, ...]]]]:
    """Checks `messages` and what says how they are written; how to read them then: their text and its ids.

    Raises ApiError (FAILED_PRECONDITION) where the checkpoint has no chat template.
    """
    template_of(model)
    check_messages(request.messages, "messages", violations)
    violations.found += check_calls(request.messages)
    going_on = request.continue_final_message
    asks = request.add_generation_prompt if request.HasField("add_generation_prompt") else not going_on
    if asks and going_on:
        violations.add("add_generation_prompt", "cannot be set together with continue_final_message")

    async def read() -> tuple[str, tuple[int, ...]]:
        return await prompts.conversation(
            request.messages, model, add_generation_prompt=asks, continue_final_message=going_on,
            template_kwargs=request.template_kwargs if request.HasField("template_kwargs") else None,
            tools=tools,
        )  # fmt: skip

    return read


def _engine_request(
    params: GenerationParams,
    token_ids: tuple[int, ...],
    model: ServedModel,
    source: Source | None,
    *,
    arrival: float,
    deadline: float,
) -> EngineRequest:
    """Raises ApiError when the tokens show that the request cannot be served."""
    start: tuple[int, ...] = ()
    if source is not None:
        token_ids, start = source.token_ids, source.start
    if params.resumed_prompt is not None and params.resumed_prompt != token_ids:
        raise invalid_argument(
            [Violation("resume.prompt_token_ids", "are not the ids of this request's prompt")]
        )
    limits = model.limits
    if source is not None:
        max_tokens = room_beside(params, source, model)
    else:
        if params.beams is not None:
            limits = limits_of_beams(params.beams, len(token_ids), model)
        max_tokens = room_for(params, len(token_ids), limits)
    _check_fits(params, len(token_ids), max_tokens, limits)
    seed = params.seed if params.seed is not None else secrets.randbits(_MAX_SEED_BITS) or 1
    indices = tuple(range(params.n))
    return EngineRequest(
        request_id=next_request_id(),
        prompt_token_ids=start or token_ids,
        source_token_ids=token_ids if start else (),
        num_start_tokens=len(start),
        sampling=replace(params.sampling, seed=seed),
        stopping=replace(
            stopping_of(params, max_tokens, model.tokenizer.eos_token_ids),
            forced_eos_token_id=model.forced_eos_token_id,
        ),
        sample_indices=indices,
        outputs=tuple(params.resumed.get(index, ()) for index in indices),
        output_top_k=params.output_top_k,
        prompt_top_k=params.prompt_top_k,
        logprob_token_ids=params.logprob_token_ids,
        priority=params.priority,
        deadline=deadline,
        arrival=arrival,
        cache_salt=params.cache_salt,
        adapter=model.adapter,
        beams=params.beams,
    )


def _told(params: GenerationParams, request: EngineRequest) -> Configuration:
    """The configuration in force, with what the prompt decided."""
    made = params.configuration
    made.sampling.seed = request.sampling.seed
    made.stopping.max_tokens = request.stopping.max_tokens
    return made


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
