"""The next step is launched before the tokens of the last one are read, so that a device never waits for us.

Standard library only. The tokens stay on the device: where a sequence's newest token is not known yet, it is
PENDING here, and the runner takes it from the last step's output there. What a token decides is seen one step
late: a sequence that ended was computed once more, and that row is dropped. How many tokens there are is
known without their values, so no step goes beyond a request's limits.

A sequence whose next token depends on the values of the last ones (penalties, grammars), or of which more is
read than a token, makes its step synchronous: first the last step's tokens, then the step, then its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from salver.server.engine.core import EngineCore, EngineLimits, Runner, StepResult
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.request import EngineRequest, StepMessage, StepStats
from salver.server.engine.schedule import Schedule, Scheduled
from salver.server.engine.sequence import PENDING, Sequence, SequenceStatus


class Flight(Protocol):
    """A step that was given to the device."""

    def result(self) -> StepResult:
        """Waits for it."""
        ...


class LaunchingRunner(Runner, Protocol):
    """Computes a step on a device that works beside the host."""

    def launch(self, schedule: Schedule, previous: Flight | None) -> Flight:
        """Gives a step to the device without waiting for it. Raises OutOfMemory.

        The PENDING tokens in it are those that `previous` chooses for the same sequences.
        """
        ...


def is_plain(request: EngineRequest) -> bool:
    """Whether nothing but the number of the tokens so far decides how the next one is chosen and told."""
    sampling = request.sampling
    return not (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.bad_words
        or sampling.allowed_words
        or sampling.no_repeat_ngram_size
        or request.grammar
        or request.beams is not None
        or request.source_token_ids
        or request.output_top_k is not None
        or request.prompt_top_k is not None
        or request.encoding is not None
    )


class _Launched:
    """A step in flight, and when it was launched."""

    __slots__ = ("begin", "flight", "schedule", "sequences")

    def __init__(self, schedule: Schedule, flight: Flight, begin: float) -> None:
        self.schedule = schedule
        self.flight = flight
        self.begin = begin
        self.sequences = {item.sequence: item for item in schedule.scheduled}


class OverlappedCore(EngineCore):
    """An `EngineCore` that has a step in flight while it plans the next one. No speculation."""

    def __init__(self, runner: LaunchingRunner, limits: EngineLimits, *, clock: Callable[[], float]) -> None:
        super().__init__(runner, limits, clock=clock)
        self._launching = runner
        self._flying: _Launched | None = None
        self._landed_at = 0.0
        self.num_overlapped = 0  # steps that were launched before the one before them was read

    @property
    def has_work(self) -> bool:
        return self._flying is not None or super().has_work

    def step(self, announce: Callable[[StepMessage], None] | None = None) -> StepMessage | None:
        begin = self._clock()
        schedule = self._plan(begin, announce)
        stats = None
        last, self._flying = self._flying, None
        if not schedule.scheduled:
            if last is not None:
                stats = self._land(last)
        elif not all(is_plain(item.sequence.request) for item in schedule.scheduled):
            stats = self._compute(schedule, last, begin)
        else:
            try:
                flight = self._launching.launch(schedule, None if last is None else last.flight)
            except OutOfMemory:
                stats = self._compute(schedule, last, begin)
            else:
                self._flying = _Launched(schedule, flight, begin)
                for item in schedule.scheduled:
                    _foresee(item)
                if last is not None:
                    self.num_overlapped += 1
                    stats = self._land(last)
        return self._message(stats)

    def _compute(self, schedule: Schedule, last: _Launched | None, begin: float) -> StepStats | None:
        """A step that needs the tokens of the last one. What ended with those is no longer in it."""
        landed = None
        if last is not None:
            landed = self._land(last)
            schedule.scheduled = [item for item in schedule.scheduled if not item.sequence.finished]
        if not schedule.scheduled:
            return landed
        return self._took(schedule, self._execute(schedule), max(begin, self._landed_at))

    def _land(self, launched: _Launched) -> StepStats:
        """Reads a step's tokens and applies them, beneath what is already foreseen of the next step."""
        result = launched.flight.result()
        now = self._clock()
        begin = max(launched.begin, self._landed_at)
        self._accounting.computed(launched.schedule.scheduled, begin, now)
        ahead = {} if self._flying is None else self._flying.sequences
        for item, row in zip(launched.schedule.scheduled, result.rows, strict=True):
            sequence = item.sequence
            if sequence.finished:  # its deadline, a cancel, or the token before this one
                continue
            while sequence.token_ids[-1] == PENDING:
                sequence.token_ids.pop()
            self._take(item, row, now)
            if sequence in ahead and not sequence.finished:
                _foresee(ahead[sequence])
        self.steps += 1
        self._landed_at = now
        return self._stats(launched.schedule, now - begin, result.model_duration)

    def _advance(self, item: Scheduled, num_accepted: int) -> None:
        # One that was preempted since has lost its blocks: there is nothing to advance, only a token to keep.
        if item.sequence.status is SequenceStatus.RUNNING:
            super()._advance(item, num_accepted)

    def weights_changed(self) -> None:
        if self._flying is not None:
            last, self._flying = self._flying, None
            self._land(last)
        super().weights_changed()

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        super().abort(request_id, sample_index)
        if not self.scheduler.has_work:
            self._flying = None  # nobody waits for it; what it writes belongs to nobody


def _foresee(item: Scheduled) -> None:
    """What is known of a launched part: how far its sequence is computed, and that a token follows."""
    sequence: Sequence = item.sequence
    samples = item.samples
    sequence.num_computed_tokens = item.start + item.num_tokens
    if samples:
        sequence.token_ids.append(PENDING)
