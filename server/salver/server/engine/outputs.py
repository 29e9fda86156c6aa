"""A request's outputs on their way to its reader: text, stop strings, usage, one slot.

Outputs are worked on when they arrive, so that a stop string frees its sample at once
even if the reader is slow; what the reader has not taken yet is merged into one pending
update, so that nothing queues without bound.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from salver.server.engine.errors import (
    EngineError,
    RequestDeadlineExceeded,
    RequestFailed,
    RequestOutOfMemory,
)
from salver.server.engine.explanation import Explanation, RequestBooks
from salver.server.engine.process import OutputSink
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SequenceOutput,
    SequenceTimings,
)
from salver.server.engine.text_stream import StopMatch, StopStrings, TextStream

if TYPE_CHECKING:
    from salver.model.tokenizer import Tokenizer

__all__ = ["CompletionDelta", "GenerationStream", "GenerationUpdate", "StopMatch"]


@dataclass(slots=True)
class CompletionDelta:
    """What was added to one sample. Offsets say where: in code points, in tokens."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]  # one per token id when asked for, else empty
    finish_reason: FinishReason | None
    stop_match: StopMatch | None
    text_offset: int
    token_offset: int
    score: float | None = None  # of an answer of a beam search


@dataclass(slots=True)
class GenerationUpdate:
    """What was added to a request since the update before; at most one delta per sample."""

    deltas: list[CompletionDelta] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # in order of position
    finished: bool = False  # the last update


class Engine(Protocol):
    """What is needed of `EngineProcess` (or of `InlineEngine`, in tests)."""

    def submit(self, request: EngineRequest, sink: OutputSink) -> None: ...

    def abort(self, request_id: int, sample_index: int | None = None) -> None: ...


class _Sample:
    """One sample: its text so far, and the delta its reader has not taken."""

    __slots__ = ("delta", "finished", "first_token", "index", "last_token", "outputs", "text", "timings")

    def __init__(self, index: int, text: TextStream) -> None:
        self.index = index
        self.text = text
        self.delta: CompletionDelta | None = None
        self.finished = False
        self.first_token = 0.0
        self.last_token = 0.0
        self.outputs = 0
        self.timings: SequenceTimings | None = None


class GenerationStream:
    """An OutputSink, and an asynchronous iterator of what came into it. For one reader, on one loop.

    Use: `start()`, then iterate (or `collect()`), and `close()` in a finally. Iterating
    raises the EngineError that ended the request, after what came before it.
    """

    def __init__(
        self,
        engine: Engine,
        request: EngineRequest,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`request` says max_tokens, min_tokens and stop ids. Nothing is submitted yet.

        Raises ValueError for an empty stop string.
        """
        # Imported when a stream is made, so that this module loads without the tokenizers library.
        from salver.model.tokenizer import Detokenizer

        self._engine = engine
        self._request = request
        self._eos_token_ids = eos_token_ids
        stop_strings = StopStrings(stop)
        stopping = request.stopping
        self._samples = {
            index: _Sample(
                index,
                TextStream(
                    tokenizer,
                    # A source is not gone on with: the output is a text of its own.
                    Detokenizer(tokenizer, continuation=not request.source_token_ids),
                    stop_strings,
                    min_tokens=stopping.min_tokens,
                    include_stop=include_stop,
                ),
            )
            for index in request.sample_indices
        }
        self._unfinished = len(self._samples)
        self._waiting_for_prompt = False
        # Positions 1... of the prompt have log-probabilities; a preempted sample may tell some again.
        self._prompt_logprobs_left = 0
        if request.prompt_top_k is not None:
            first = max(1, request.prompt_logprobs_start)
            self._prompt_logprobs_left = max(0, len(request.prompt_token_ids) - first)
        self._prompt_logprobs: list[Logprobs] = []
        self._changed: list[_Sample] = []  # samples with a delta, in order
        self._news = asyncio.Event()
        self._collecting = False
        self._error: EngineError | None = None
        self._submitted = False
        self._closed = False
        self._exhausted = False
        self._queue_seconds: float | None = None
        self._books = RequestBooks(request.arrival) if request.explain else None
        self._reader_waits = False
        self.completion_tokens = 0  # over all samples, resumed ones included
        self.resumed_tokens = 0
        self.cached_tokens = 0

    # --- the reader's side -------------------------------------------------------------

    def start(self) -> None:
        """Replays resumed tokens and submits the samples that they leave unfinished.

        A sample that they finish is answered at once: no tokens, no text (whoever sent its
        last token sent all its text with it) and the finish reason. Raises EngineUnavailable.
        """
        request = self._request
        rest: list[tuple[int, tuple[int, ...]]] = []
        for index, output in zip(request.sample_indices, request.outputs, strict=True):
            sample = self._samples[index]
            if output and self._replay(sample, output):
                self._unfinished -= 1
            else:
                rest.append((index, output))
        if not rest and self._prompt_logprobs_left:
            # Every sample is answered, but the prompt's log-probabilities are still wanted.
            self._waiting_for_prompt = True
            rest = [(request.sample_indices[0], ())]
            request = replace(request, stopping=replace(request.stopping, max_tokens=0))
        if rest:
            if self._books is not None:
                request = replace(request, submitted=time.monotonic())
                self._books.submitted(request.submitted)
            indices, outputs = zip(*rest, strict=True)
            if len(rest) < len(self._samples) or self._waiting_for_prompt:
                request = replace(request, sample_indices=indices, outputs=outputs)
            self._engine.submit(request, self)
            self._submitted = True
        if self._changed:
            self._news.set()

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> GenerationUpdate:
        """All that came since the last call; waits while there is nothing. Raises EngineError."""
        while True:
            self._reader_waits = True
            await self._news.wait()
            self._reader_waits = False
            self._news.clear()
            if self._changed or self._prompt_logprobs:
                return self._take()
            if self._error is not None:
                self._news.set()
                raise self._error
            if self._exhausted or self._closed:
                self._news.set()
                raise StopAsyncIteration
            if self.finished:
                return self._take()

    async def collect(self) -> GenerationUpdate:
        """The whole answer as one update, without waking up for its parts. Raises EngineError."""
        self._collecting = self._reader_waits = True
        if not (self.finished or self._error or self._closed):
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        return self._take()

    def close(self) -> None:
        """Aborts what still runs. Idempotent; a reader that waits is told the end."""
        if self._closed:
            return
        self._closed = True
        if self._submitted and self._error is None and not self.finished:
            self._engine.abort(self._request.request_id)
        self._news.set()

    @property
    def finished(self) -> bool:
        """Whether all samples have ended (the reader may not have taken everything yet)."""
        return self._unfinished == 0 and not self._waiting_for_prompt

    @property
    def timings(self) -> SequenceTimings:
        """Seconds of the request: to its first sample's start, its first token, its last; most steps.

        The engine times samples, except those that a stop string ended: their tokens' arrival here counts.
        """
        of_samples = [t for s in self._samples.values() if (t := s.timings or self._measured(s)) is not None]
        if not of_samples:
            return SequenceTimings(queue=self._queue_seconds or 0.0)
        queue = min(t.queue for t in of_samples)
        first = min(t.queue + t.prefill for t in of_samples)
        last = max(t.queue + t.prefill + t.decode for t in of_samples)
        steps = max(t.steps for t in of_samples)
        preemptions = sum(t.preemptions for t in of_samples)
        return SequenceTimings(queue, first - queue, last - first, steps, preemptions)

    def explain(self, now: float) -> Explanation | None:
        """Of a request with `explain` whose reply is made now."""
        return None if self._books is None else self._books.explain(now)

    # --- the engine's side -------------------------------------------------------------

    def put(self, output: SequenceOutput) -> None:
        """Takes one step's output of one sample."""
        if self._closed or self._error is not None:
            return
        if output.num_cached_tokens > self.cached_tokens:
            self.cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs and self._prompt_logprobs_left:
            new = output.prompt_logprobs[: self._prompt_logprobs_left]
            self._prompt_logprobs_left -= len(new)
            self._prompt_logprobs += new
        sample = self._samples[output.sample_index]
        if self._books is not None and (not sample.finished or self._waiting_for_prompt):
            self._books.took(output, time.monotonic(), self._reader_waits)
        reason = output.finish_reason
        if reason in (FinishReason.DEADLINE, FinishReason.ERROR, FinishReason.MEMORY):
            self._end_all(reason, output.error)
            return
        if not sample.finished:
            if output.token_ids or reason is not None:
                self._append(sample, output)
        elif self._waiting_for_prompt and reason is not None:
            self._waiting_for_prompt = False
            sample.timings = output.timings
        if not self._collecting or self.finished:
            self._news.set()

    def started(self, seconds: float) -> None:
        """The engine began to compute the request, so long after its arrival."""
        if self._queue_seconds is None:
            self._queue_seconds = seconds

    def fail(self, error: EngineError) -> None:
        """Ends the request: its reader gets the error after what came before it."""
        if self._error is None and not self.finished:
            self._error = error
            self._news.set()

    # --- inside ------------------------------------------------------------------------

    def _replay(self, sample: _Sample, output: tuple[int, ...]) -> bool:
        """Takes the tokens that the sample had already; whether they finish it."""
        stopping = self._request.stopping
        text = sample.text
        reason: FinishReason | None = None
        for token_id in output:
            forced = stopping.forced_eos_token_id is not None and text.num_tokens == stopping.max_tokens - 1
            ends = token_id in stopping.stop_token_ids and text.num_tokens >= stopping.min_tokens
            if ends and not forced:
                text.finish_with_stop_token(token_id, eos=token_id in self._eos_token_ids)
            else:
                text.add(token_id)
            if text.match is not None:
                reason = FinishReason.STOP
                break
            if text.num_tokens >= stopping.max_tokens:
                text.finish()
                reason = FinishReason.LENGTH
                break
        self.resumed_tokens += text.num_tokens
        self.completion_tokens += text.num_tokens
        if reason is None:
            return False
        delta = self._delta(sample)
        delta.finish_reason = reason
        delta.stop_match = text.match
        sample.finished = True
        return True

    def _append(self, sample: _Sample, output: SequenceOutput) -> None:
        text = sample.text
        delta = sample.delta or self._delta(sample)
        token_ids = output.token_ids
        reason = output.finish_reason
        if token_ids:
            sample.last_token = time.monotonic()
            if not sample.outputs:
                sample.first_token = sample.last_token
            sample.outputs += 1
            plain = len(token_ids)
            if reason is FinishReason.STOP:
                plain -= 1
            before = text.num_tokens
            for token_id in token_ids[:plain]:
                delta.text += text.add(token_id)
                if text.match is not None:
                    if reason is None:
                        # Only here is it known that the sample is over; the engine goes on otherwise.
                        self._engine.abort(output.request_id, output.sample_index)
                    reason = FinishReason.STOP
                    break
            else:
                if reason is FinishReason.STOP:
                    last = token_ids[-1]
                    delta.text += text.finish_with_stop_token(last, eos=last in self._eos_token_ids)
            taken = text.num_tokens - before
            self.completion_tokens += taken
            delta.token_ids += token_ids[:taken]
            if output.logprobs:
                delta.logprobs += output.logprobs[:taken]
        if reason is not None:
            if text.match is None:
                delta.text += text.finish()
            delta.finish_reason = reason
            delta.stop_match = text.match
            delta.score = output.score
            sample.finished = True
            sample.timings = output.timings
            self._unfinished -= 1

    def _delta(self, sample: _Sample) -> CompletionDelta:
        """A new, empty delta of the sample, for the pending update."""
        text = sample.text
        sample.delta = CompletionDelta(sample.index, "", [], [], None, None, text.length, text.num_tokens)
        self._changed.append(sample)
        return sample.delta

    def _take(self) -> GenerationUpdate:
        """Empties the slot."""
        deltas: list[CompletionDelta] = []
        for sample in self._changed:
            if sample.delta is not None:
                deltas.append(sample.delta)
                sample.delta = None
        self._changed = []
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        finished = self.finished
        self._exhausted = finished
        if finished and self._books is not None:
            self._books.taken(time.monotonic())
        if finished or self._error is not None:
            self._news.set()
        return GenerationUpdate(deltas, prompt_logprobs, finished)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        """One sample's deadline or failure ends the request."""
        if reason is FinishReason.DEADLINE:
            self.fail(RequestDeadlineExceeded("the deadline passed before the answer was complete"))
        elif reason is FinishReason.MEMORY:
            self.fail(RequestOutOfMemory(error))
        else:
            self.fail(RequestFailed(error or "the computation of the request failed"))
        self._engine.abort(self._request.request_id)

    def _measured(self, sample: _Sample) -> SequenceTimings | None:
        if not sample.outputs:
            return None
        queue = self._queue_seconds or 0.0
        prefill = max(0.0, sample.first_token - self._request.arrival - queue)
        return SequenceTimings(queue, prefill, sample.last_token - sample.first_token, sample.outputs)
