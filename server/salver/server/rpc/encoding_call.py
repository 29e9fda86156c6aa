"""One call for readouts of a model on its way through the engine: its inputs are computed together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from numpy.typing import NDArray

from salver.model.tokenizer.encoding import EncodedText
from salver.server.admission import Admission, Permit
from salver.server.engine.errors import (
    EngineError,
    RequestDeadlineExceeded,
    RequestFailed,
    RequestOutOfMemory,
)
from salver.server.engine.explanation import RequestBooks
from salver.server.engine.request import (
    EncodingParams,
    EngineRequest,
    FinishReason,
    Readout,
    SamplingParams,
    SequenceOutput,
    SequenceTimings,
    StoppingParams,
)
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.errors import out_of_range
from salver.server.rpc.generation import deadline_of
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.served import Front, ServedModel
from salver.server.rpc.sources import NO_SOURCE, Source
from salver.server.rpc.submission import Submissions, next_request_id
from salver.server.rpc.validation import Violations, check_priority
from salver.v1 import common_pb2

Arrays = tuple[NDArray[Any], ...]


class ArraySink:
    """Takes the arrays of one input; `done` ends with them or with an EngineError."""

    def __init__(self, request: EngineRequest, books: RequestBooks) -> None:
        self.request = request
        self._books = books
        self.done: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        self.timings = SequenceTimings()

    def started(self, seconds: float) -> None:
        self.timings.queue = seconds

    def put(self, output: SequenceOutput) -> None:
        reason = output.finish_reason
        if self.done.done() or reason is None:
            return
        self._books.took(output, time.monotonic())
        if reason is FinishReason.DEADLINE:
            self.fail(RequestDeadlineExceeded("the deadline passed before everything was computed"))
        elif reason is FinishReason.MEMORY:
            self.fail(RequestOutOfMemory(output.error))
        elif reason is FinishReason.ERROR or not output.arrays:
            self.fail(RequestFailed(output.error or f"ended ({reason.value}) without an answer"))
        else:
            if output.timings is not None:
                self.timings = output.timings
            self.done.set_result(output.arrays)

    def fail(self, error: EngineError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def end(self, submissions: Submissions) -> None:
        """Aborts what still runs."""
        if not self.done.done():
            submissions.abort(self.request.request_id)
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # it was seen: asyncio need not complain of those nobody awaited


@dataclass(frozen=True, slots=True)
class NextToken:
    """How the token after an input, and the output that it has already, would be chosen."""

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    stopping: StoppingParams = field(default_factory=lambda: StoppingParams(max_tokens=0))
    output_token_ids: tuple[int, ...] = ()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a call's inputs: their arrays in order, the tokens they were, and when."""

    arrays: list[Arrays]
    num_tokens: int
    timings: SequenceTimings
    books: RequestBooks | None = None  # of a call that asked to be explained


class EncodingCall:
    """Holds the call's permit. Use as a context manager: what still runs at its end is aborted."""

    def __init__(
        self,
        front: Front,
        admission: Admission,
        metrics: Metrics,
        num_inputs: int,
        *,
        arrival: float,
        deadline: float,
        priority: int,
        adapter: str = "",
        explain: bool = False,
    ) -> None:
        """Raises ApiError (RESOURCE_EXHAUSTED) when too much waits."""
        self._explain = explain
        self._books = RequestBooks(arrival)
        self._front = front
        self._metrics = metrics
        self._arrival = arrival
        self._deadline = deadline
        self._priority = priority
        self._adapter = adapter
        self._permit: Permit = admission.admit(num_inputs)
        self._submissions = Submissions(front.engine, metrics, self._permit)
        self._sinks: list[ArraySink] = []

    def __enter__(self) -> EncodingCall:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.end(self._submissions)
        self._permit.release()

    async def compute(
        self,
        inputs: Sequence[EncodedText],
        params: Sequence[EncodingParams],
        next_token: NextToken | None = None,
        source: Source = NO_SOURCE,
    ) -> Computed:
        """Of every input what its params ask for. Raises ApiError and EngineError.

        `next_token`: how it would be chosen, where that is asked for. `source`: what an encoder-decoder
        reads beside the inputs, which are of its decoder and begin with the source's `start`.
        """
        next_token = next_token or NextToken()
        made = [self._request(*both, next_token, source) for both in zip(inputs, params, strict=True)]
        num_tokens = sum(request.num_input_tokens + len(next_token.output_token_ids) for request in made)
        self._permit.add_tokens(num_tokens)
        self._books.submitted(submitted := time.monotonic())
        sinks = [ArraySink(replace(request, submitted=submitted), self._books) for request in made]
        self._permit.check_deadline([sink.request for sink in sinks])
        for sink in sinks:
            self._sinks.append(sink)
            self._submissions.submit(sink.request, sink)
        guards = [self._front.running(sink) for sink in self._sinks]
        for guard in guards:
            guard.__enter__()
        try:
            arrays = await asyncio.gather(*(sink.done for sink in self._sinks))
        finally:
            for guard in guards:
                guard.__exit__(None, None, None)
        timings = self._timings()
        self._metrics.request_ended(timings, time.monotonic() - self._arrival, num_tokens)
        for _ in self._sinks:
            self._metrics.succeeded("encode")
        return Computed(list(arrays), num_tokens, timings, self._books if self._explain else None)

    def _request(
        self, tokens: EncodedText, encoding: EncodingParams, next_token: NextToken, source: Source
    ) -> EngineRequest:
        return EngineRequest(
            request_id=next_request_id(),
            prompt_token_ids=tokens.token_ids,
            source_token_ids=source.token_ids,
            num_start_tokens=len(source.start),
            sampling=next_token.sampling,
            stopping=next_token.stopping,
            outputs=(next_token.output_token_ids,),
            priority=self._priority,
            deadline=self._deadline,
            arrival=self._arrival,
            encoding=encoding,
            adapter=self._adapter,
            grammar=next_token.grammar,
            explain=self._explain,
        )

    def _timings(self) -> SequenceTimings:
        """Of the whole call: to its first start, from there to its last end."""
        of_inputs = [sink.timings for sink in self._sinks]
        queue = min(item.queue for item in of_inputs)
        return SequenceTimings(
            queue=queue,
            prefill=max(0.0, max(item.queue + item.prefill for item in of_inputs) - queue),
            steps=max(item.steps for item in of_inputs),
            preemptions=sum(item.preemptions for item in of_inputs),
        )


def encoding_params(
    model: ServedModel, readout: Readout, tokens: EncodedText, **fields: Any
) -> EncodingParams:
    """Asks for a readout of an input as the model reads it."""
    encoder = model.encoder
    segments = tokens.segments if encoder is not None and encoder.num_segments > 1 else ()
    return EncodingParams(
        readout, whole=encoder is not None, segments=segments if any(segments) else (), **fields
    )


def fitted(tokens: EncodedText, limit: int, field: str, truncate: bool, model: ServedModel) -> EncodedText:
    """The input as it is, or shortened where that was asked for.

    Raises ApiError (OUT_OF_RANGE) for one longer than `limit` tokens.
    """
    if len(tokens) <= limit:
        return tokens
    if truncate:
        try:
            return tokens.shortened(limit)
        except ValueError as error:
            raise out_of_range(
                f"{field}: {error}", input_tokens=len(tokens), max_input_tokens=limit
            ) from error
    raise out_of_range(
        f"{field} is {len(tokens)} tokens; {model.name!r} reads at most {limit} "
        "(set truncate to leave out the end)",
        input_tokens=len(tokens),
        max_input_tokens=limit,
    )


class EngineCalls:
    """What services of readouts share: a call's way in, and what every reply says."""

    def __init__(self, front: Front, admission: Admission, metrics: Metrics, reader: PromptReader) -> None:
        self._front = front
        self._admission = admission
        self._metrics = metrics
        self._reader = reader

    def _call(
        self,
        request: Any,
        context: grpc.aio.ServicerContext,
        violations: Violations,
        model: ServedModel,
        arrival: float,
        num_inputs: int = 1,
    ) -> EncodingCall:
        """Admits the call. Raises ApiError: also for the violations found so far."""
        priority = check_priority(request, violations)
        violations.raise_any()
        return EncodingCall(
            self._front, self._admission, self._metrics, num_inputs,
            arrival=arrival, deadline=deadline_of(context, arrival), priority=priority,
            adapter=model.adapter, explain=getattr(request, "explain", False),
        )  # fmt: skip

    @staticmethod
    def _response(
        kind: Any, request: Any, model: ServedModel, computed: Computed, arrival: float, **fields: Any
    ) -> Any:
        total = time.monotonic() - arrival
        if computed.books is not None:
            fields["explanation"] = convert.explanation(computed.books.explain(arrival + total), total)
        return kind(
            request_id=request.request_id,
            model=model.name,
            usage=common_pb2.Usage(prompt_tokens=computed.num_tokens),
            timings=convert.timings(computed.timings, total),
            numerics_id=model.numerics_id,
            weights_version=model.in_force.version,
            **fields,
        )
