"""Score: the log-likelihood of continuations. The engine computes prompts and samples nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from salver.server.admission import Admission
from salver.server.engine.errors import (
    EngineError,
    RequestDeadlineExceeded,
    RequestFailed,
    RequestOutOfMemory,
)
from salver.server.engine.explanation import RequestBooks
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SamplingParams,
    SequenceOutput,
    SequenceTimings,
    StoppingParams,
)
from salver.server.metrics import Metrics
from salver.server.rpc import convert
from salver.server.rpc.prompts import PromptReader, ScorePrompt
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.sources import check_languages, score_prompt
from salver.server.rpc.submission import Submissions, next_request_id
from salver.server.rpc.validation import (
    Violations,
    check_priority,
    check_prompt,
    check_request_id,
    check_score_length,
    check_score_top_k,
    model_named,
)
from salver.v1 import common_pb2, generation_pb2


class ScoreSink:
    """Gathers the log-probabilities of one prompt; `done` ends with them or with an EngineError."""

    def __init__(self, request: EngineRequest, books: RequestBooks) -> None:
        self.request = request
        self._books = books
        self.done: asyncio.Future[list[Logprobs]] = asyncio.get_running_loop().create_future()
        self.timings = SequenceTimings()
        self._wanted = len(request.prompt_token_ids) - max(1, request.prompt_logprobs_start)
        self._logprobs: list[Logprobs] = []

    def started(self, seconds: float) -> None:
        self.timings.queue = seconds

    def put(self, output: SequenceOutput) -> None:
        if self.done.done():
            return
        self._books.took(output, time.monotonic())
        if output.prompt_logprobs:
            # A preempted request tells some positions again.
            self._logprobs += output.prompt_logprobs[: self._wanted - len(self._logprobs)]
        reason = output.finish_reason
        if reason is FinishReason.DEADLINE:
            self.fail(RequestDeadlineExceeded("the deadline passed before everything was scored"))
        elif reason is FinishReason.MEMORY:
            self.fail(RequestOutOfMemory(output.error))
        elif reason is FinishReason.ERROR:
            self.fail(RequestFailed(output.error or "the computation of the request failed"))
        elif reason is not None and len(self._logprobs) < self._wanted:
            self.fail(RequestFailed(f"ended ({reason.value}) before everything was scored"))
        elif reason is not None:
            if output.timings is not None:
                self.timings = output.timings
            # No token is sampled: the whole computation is prefill.
            elapsed = time.monotonic() - self.request.arrival
            self.timings.prefill = max(0.0, elapsed - self.timings.queue)
            self.done.set_result(self._logprobs)

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


async def score(
    request: generation_pb2.ScoreRequest,
    front: Front,
    admission: Admission,
    metrics: Metrics,
    reader: PromptReader,
    *,
    arrival: float,
    deadline: float,
) -> generation_pb2.ScoreResponse:
    """Answers a ScoreRequest: its inputs are computed together. Raises ApiError and EngineError."""
    model = model_named(request.model, front.model)
    model.require(Task.SCORE)
    top_k, priority = _checked(request, model)
    permit = admission.admit(len(request.inputs))
    sinks: list[ScoreSink] = []
    books = RequestBooks(arrival)
    submissions = Submissions(front.engine, metrics, permit)
    try:
        prompts = await reader.score(request.inputs, model)
        for position, prompt in enumerate(prompts):
            if model.source is None:
                check_score_length(len(prompt.token_ids), f"inputs[{position}]", model.limits)
            else:
                prompts[position] = _with_source(prompt, f"inputs[{position}]", request, model)
        books.submitted(submitted := time.monotonic())
        made = (_engine_request(prompt, top_k, priority, arrival, deadline, model) for prompt in prompts)
        marked = (replace(item, explain=request.explain, submitted=submitted) for item in made)
        sinks += (ScoreSink(item, books) for item in marked)
        permit.add_tokens(sum(sink.request.num_input_tokens for sink in sinks))
        # One token and nothing before it: there is nothing to compute.
        permit.check_deadline([sink.request for sink in sinks if len(sink.request.prompt_token_ids) > 1])
        for sink in sinks:
            if len(sink.request.prompt_token_ids) == 1:
                sink.done.set_result([])
            else:
                submissions.submit(sink.request, sink)
        guards = [front.running(sink) for sink in sinks]
        for guard in guards:
            guard.__enter__()
        try:
            scored = await asyncio.gather(*(sink.done for sink in sinks))
        finally:
            for guard in guards:
                guard.__exit__(None, None, None)
    finally:
        for sink in sinks:
            sink.end(submissions)
        permit.release()
    timings = _timings([sink.timings for sink in sinks])
    total = time.monotonic() - arrival
    num_tokens = sum(sink.request.num_input_tokens for sink in sinks)
    metrics.request_ended(timings, total, num_tokens)
    for _ in sinks:
        metrics.succeeded("score")
    explanation = convert.explanation(books.explain(arrival + total), total) if request.explain else None
    return generation_pb2.ScoreResponse(
        request_id=request.request_id,
        model=model.name,
        results=[_result(prompt, logprobs, model) for prompt, logprobs in zip(prompts, scored, strict=True)],
        usage=common_pb2.Usage(prompt_tokens=num_tokens),
        timings=convert.timings(timings, total),
        numerics_id=model.numerics_id,
        weights_version=model.in_force.version,
        explanation=explanation,
    )


def _checked(request: Any, model: ServedModel) -> tuple[int | None, int]:
    """(top_k, priority). Raises ApiError for everything that is wrong."""
    violations = Violations()
    limits = model.limits
    check_request_id(request.request_id, violations)
    priority = check_priority(request, violations)
    top_k = check_score_top_k(request, limits, violations)
    if not request.inputs:
        violations.add("inputs", "must not be empty")
    elif len(request.inputs) > limits.max_queued_requests:
        violations.add("inputs", f"must be at most {limits.max_queued_requests}, the length of the queue")
    else:
        for position, item in enumerate(request.inputs):
            field = f"inputs[{position}]"
            check_prompt(
                item.context, f"{field}.context", model.input_vocab_size, violations, may_be_empty=True
            )
            check_prompt(item.continuation, f"{field}.continuation", limits.vocab_size, violations)
    check_languages(request, model, violations)
    violations.raise_any()
    return top_k, priority


def _with_source(prompt: ScorePrompt, field: str, request: Any, model: ServedModel) -> ScorePrompt:
    """The continuation behind what an output begins with. Raises ApiError."""
    source, output = score_prompt(prompt.source_ids, prompt.token_ids, field, request, model)
    return ScorePrompt(output, len(source.start), source.token_ids)


def _engine_request(
    prompt: ScorePrompt,
    top_k: int | None,
    priority: int,
    arrival: float,
    deadline: float,
    model: ServedModel,
) -> EngineRequest:
    return EngineRequest(
        request_id=next_request_id(),
        prompt_token_ids=prompt.token_ids,
        source_token_ids=prompt.source_ids,
        num_start_tokens=prompt.start if prompt.source_ids else 0,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=0),
        prompt_top_k=top_k or 0,
        prompt_logprobs_start=prompt.start,
        priority=priority,
        deadline=deadline,
        arrival=arrival,
        adapter=model.adapter,
    )


def _result(prompt: ScorePrompt, logprobs: list[Logprobs], model: ServedModel) -> generation_pb2.ScoreResult:
    continuation = prompt.token_ids[prompt.start :]
    return generation_pb2.ScoreResult(
        logprobs=convert.prompt_logprobs(continuation, logprobs, model.tokenizer),
        sum=sum(item.logprob for item in logprobs),
        is_greedy=all(item.rank == 1 for item in logprobs),
    )


def _timings(of_inputs: Sequence[SequenceTimings]) -> SequenceTimings:
    """Of the whole request: to the first start, from there to the last end."""
    queue = min(item.queue for item in of_inputs)
    end = max(item.queue + item.prefill for item in of_inputs)
    return SequenceTimings(
        queue=queue,
        prefill=end - queue,
        steps=max(item.steps for item in of_inputs),
        preemptions=sum(item.preemptions for item in of_inputs),
    )
