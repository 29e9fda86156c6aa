"""One step of the engine: schedule, run, and tell what came of it.

No torch, no clock and no pipe of its own: the worker steps it in a process of its own, and
`InlineEngine` steps it in the caller's loop with whatever clock a test likes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from salver.server.engine.accounting import StepAccounting
from salver.server.engine.beam import Candidate, beam_capacity
from salver.server.engine.beam_groups import BeamGroup
from salver.server.engine.blocks import BlockPool
from salver.server.engine.drafts import Speculation
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SequenceOutput,
    StepMessage,
    StepStats,
)
from salver.server.engine.schedule import Schedule, Scheduled
from salver.server.engine.scheduler import Scheduler
from salver.server.engine.sequence import Sequence

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class RowResult:
    """What the model gave for one scheduled part."""

    # The tokens chosen, if the part reached the newest token: one more than the drafts that were right.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None  # one per token, when asked for
    prompt_logprobs: list[Logprobs] | None = None
    error: str = ""  # this sequence alone failed
    out_of_memory: bool = False  # because it alone does not fit
    exhausted: bool = False  # its parameters leave no token to choose
    partial: object = None  # what `encoding` has read so far; comes back as the sequence's `partial`
    arrays: tuple[NDArray[Any], ...] = ()  # what it asked for, once all is computed
    candidates: list[Candidate] | None = None  # what may follow a beam, in place of a token


@dataclass(slots=True)
class StepResult:
    """One result per scheduled part, in order, and the seconds spent inside the model."""

    rows: list[RowResult]
    model_duration: float = 0.0


class Runner(Protocol):
    """Computes a step on the device.

    Raises OutOfMemory when the step does not fit. It changes nothing of the sequences, so that
    parts of the same step can be computed again.
    """

    def execute(self, schedule: Schedule) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the core holds itself to; sizes in tokens, blocks and sequences."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tokens_for_one: int = 0  # that a step computes in about the time of one; see `step_budget`
    priority_interval: float = 1.0
    rope_context: tuple[int, str] = (0, "")  # as in ModelSpec
    max_source_len: int = 0  # of an encoder-decoder's sources; 0: there is no encoder
    enable_prefix_caching: bool = True
    check_integrity: bool = False


@dataclass(slots=True)
class _Pending:
    """What a step message will hold, gathered also between steps (aborts, refusals)."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    started: list[tuple[int, float]] = field(default_factory=list)


class EngineCore:
    """Requests in, step messages out."""

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        *,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
    ) -> None:
        self.limits = limits
        self.pool = BlockPool(
            limits.num_blocks, limits.block_size, enable_prefix_caching=limits.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            tokens_for_one=limits.tokens_for_one,
            priority_interval=limits.priority_interval,
            speculation=speculation,
            rope_context=limits.rope_context,
        )
        self.steps = 0
        self.generated_tokens = 0
        self.runner = runner
        self._clock = clock
        self._accounting = StepAccounting()
        self._pending = _Pending()
        self._started: set[int] = set()  # unfinished requests whose start was told

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending.outputs)

    def add(self, request: EngineRequest) -> None:
        """Queues a request. One that could never run is answered with an error in the next step."""
        problem = self._refusal(request)
        if problem:
            for index in request.sample_indices:
                self._pending.outputs.append(
                    SequenceOutput(request.request_id, index, finish_reason=FinishReason.ERROR, error=problem)
                )
            return
        self.scheduler.add(request)

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        """Frees everything that a request, or one sample of it, holds; unknown ones are ignored.

        (They ended on their way here.) Nothing is answered: who aborts does not wait.
        """
        group = self.scheduler.beams.of(request_id)
        if group is not None:
            if not group.give_up(sample_index):
                self.scheduler.beams.finish(group, FinishReason.ABORT)
        else:
            for sequence in self.scheduler.find(request_id, sample_index):
                self.scheduler.finish(sequence, FinishReason.ABORT)
        self._forget_started(request_id)

    def step(self, announce: Callable[[StepMessage], None] | None = None) -> StepMessage | None:
        """Runs one step. None when there was nothing to do and nothing to tell.

        `announce` is told which requests the step begins with, before it computes them: where
        computing them ends this process, the other side knows whom it computed.
        """
        begin = self._clock()
        schedule = self._plan(begin, announce)
        stats = None
        if schedule.scheduled:
            stats = self._took(schedule, self._execute(schedule), begin)
        return self._message(stats)

    def _plan(self, begin: float, announce: Callable[[StepMessage], None] | None) -> Schedule:
        """What the next step computes; whom it begins with is told, or will be with the step's outputs."""
        for sequence in self.scheduler.expired(begin):
            self._finish(sequence, FinishReason.DEADLINE)
        schedule = self.scheduler.schedule(begin)
        for sequence in schedule.started:
            request_id = sequence.request.request_id
            if request_id not in self._started:
                self._started.add(request_id)
                self._pending.started.append((request_id, begin - sequence.arrival))
        if schedule.scheduled and announce is not None and self._pending.started:
            announce(StepMessage([], self._pending.started, None))
            self._pending.started = []
        return schedule

    def _took(self, schedule: Schedule, result: StepResult, begin: float) -> StepStats:
        """Applies a computed step that began at `begin`."""
        now = self._clock()
        self._accounting.computed(schedule.scheduled, begin, now)
        for item, row in zip(schedule.scheduled, result.rows, strict=True):
            self._take(item, row, now)
        for group in self.scheduler.beams.complete():
            self._choose_beams(group, now)
        self.steps += 1
        return self._stats(schedule, self._clock() - begin, result.model_duration)

    def _stats(self, schedule: Schedule, duration: float, model_duration: float) -> StepStats:
        return StepStats(
            schedule.num_tokens, len(schedule.scheduled), duration, model_duration,
            sum(i.num_tokens - len(i.draft) - 1 + i.num_source_tokens for i in schedule.scheduled),
            self._accounting.charge(schedule.scheduled, duration),
        )  # fmt: skip

    def _message(self, stats: StepStats | None) -> StepMessage | None:
        """What was gathered since the last message; None when it is nothing."""
        if self.limits.check_integrity:
            self.scheduler.check_integrity()
        pending, self._pending = self._pending, _Pending()
        if not (pending.outputs or pending.started or stats):
            return None
        return StepMessage(pending.outputs, pending.started, stats)

    def weights_changed(self) -> None:
        """What other weights computed is found no more. Unfinished sequences go on over it, by themselves."""
        self.pool.reset_prefix_cache()
        for sequence in self.scheduler.unfinished():
            sequence.shares_prefix = False

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every block is accounted for. For idle moments: it looks at all."""
        self.scheduler.check_integrity()

    def _execute(self, schedule: Schedule) -> StepResult:
        """The step at once; in halves where it does not fit, down to the part that fails alone.

        What is computed again gives the same keys, values and tokens. Only the block copies must
        not come after a part that has written into them, so they go with the first part that works.
        """
        try:
            return self.runner.execute(schedule)
        except OutOfMemory as error:
            reason = str(error)
        # Out of the except block: its traceback would hold the failed step's tensors.
        if len(schedule.scheduled) == 1:
            return StepResult([RowResult(error=reason, out_of_memory=True)])
        result, copies = StepResult([]), schedule.copies
        middle = len(schedule.scheduled) // 2
        for half in (schedule.scheduled[:middle], schedule.scheduled[middle:]):
            computed = self._execute(Schedule(half, copies))
            result.rows += computed.rows
            result.model_duration += computed.model_duration
            if not all(row.out_of_memory for row in computed.rows):
                copies = []
        return result

    def _refusal(self, request: EngineRequest) -> str:
        prompt, output = len(request.prompt_token_ids), max(map(len, request.outputs), default=0)
        total = prompt + max(request.stopping.max_tokens, output)
        whole = request.encoding is not None and request.encoding.whole
        source = len(request.source_token_ids)
        needed = 0 if whole else self.pool.blocks_for(total) + self.pool.blocks_for(source)
        if prompt == 0:
            return "the prompt is empty"
        if (source == 0) != (self.limits.max_source_len == 0):
            return "there is no encoder for the source" if source else "the source is empty"
        if source > self.limits.max_source_len:
            return f"{source} tokens are more than the encoder reads ({self.limits.max_source_len})"
        if total > self.limits.max_model_len:
            return f"{total} tokens are more than the context of {self.limits.max_model_len}"
        if needed > self.pool.num_blocks - 1:
            held = (self.pool.num_blocks - 1) * self.pool.block_size
            return f"{total + source} tokens are more than the cache holds ({held})"
        return "" if request.beams is None else self._refusal_of_beams(request, total)

    def _refusal_of_beams(self, request: EngineRequest, total: int) -> str:
        places, pool = request.num_places, self.pool
        if places > self.limits.max_num_seqs:
            return f"{places} beams are more than the {self.limits.max_num_seqs} sequences of a step"
        blocks = pool.num_blocks - 1 - pool.blocks_for(len(request.source_token_ids))
        held = beam_capacity(len(request.prompt_token_ids), places, blocks, pool.block_size)
        if total > held:
            return f"{total} tokens of {places} beams are more than the cache holds of them ({held})"
        return ""

    def _take(self, item: Scheduled, row: RowResult, now: float) -> None:
        """Applies one row of the step's result to its sequence."""
        sequence = item.sequence
        if sequence.finished:  # together with another beam
            return
        sequence.steps += 1
        if row.error:
            reason = FinishReason.MEMORY if row.out_of_memory else FinishReason.ERROR
            self._finish(sequence, reason, error=row.error)
            return
        if row.exhausted:
            self._finish(sequence, FinishReason.ABORT, prompt_logprobs=row.prompt_logprobs)
            return
        if row.prompt_logprobs:
            sequence.next_prompt_logprob += len(row.prompt_logprobs)
        sequence.partial = row.partial
        if row.candidates is not None:
            self.scheduler.beams.take(sequence, row.candidates)
        self._advance_and_tell(item, row, now)

    def _advance_and_tell(self, item: Scheduled, row: RowResult, now: float) -> None:
        sequence = item.sequence
        reason: FinishReason | None = None
        token_ids: list[int] = []
        for token_id in row.token_ids:
            token_ids.append(token_id)
            sequence.token_ids.append(token_id)
            reason = sequence.finish_reason_after(token_id)
            if reason is not None:
                break  # what a draft guessed behind the end was never asked for
        self._advance(item, max(0, len(token_ids) - 1))
        if token_ids:
            sequence.last_token = now
            if sequence.first_token is None:
                sequence.first_token = now
            self.generated_tokens += len(token_ids)
            self.scheduler.charge(sequence, len(token_ids))
        elif not sequence.generates and sequence.num_computed_tokens == sequence.num_tokens:
            sequence.first_token = sequence.last_token = now
            reason = FinishReason.LENGTH
        if item.draft and self.scheduler.speculation is not None:
            self.scheduler.speculation.checked(sequence, len(item.draft), len(row.token_ids) - 1)
        logprobs = row.logprobs[: len(token_ids)] if row.logprobs else None
        if reason is not None:
            self._finish(sequence, reason, token_ids, logprobs, row.prompt_logprobs, arrays=row.arrays)
        elif token_ids or row.prompt_logprobs:
            self._pending.outputs.append(
                SequenceOutput(
                    sequence.request.request_id,
                    sequence.sample_index,
                    token_ids,
                    logprobs,
                    row.prompt_logprobs,
                    num_cached_tokens=sequence.num_cached_tokens,
                    account=sequence.account,
                )
            )

    def _advance(self, item: Scheduled, num_accepted: int) -> None:
        self.scheduler.advance(item, num_accepted)

    def _choose_beams(self, group: BeamGroup, now: float) -> None:
        """What follows the beams of a request, once all of them are computed."""
        if not group.complete:  # another request has taken its blocks meanwhile
            return
        children = group.advance()
        self.scheduler.charge(group.live[0], max(1, len(children)))
        for beam in group.live:
            beam.last_token = now
            if beam.first_token is None:
                beam.first_token = now
        if group.search.ended:
            self._finish_beams(group, group.outputs())
            return
        self.scheduler.beams.go_on(group, children)
        if not group.told:
            group.told = True
            self._pending.outputs += [
                SequenceOutput(group.request.request_id, index, computing=True)
                for index in group.sample_indices
            ]

    def _finish_beams(self, group: BeamGroup, outputs: list[SequenceOutput]) -> None:
        self.generated_tokens += sum(len(output.token_ids) for output in outputs)
        self._pending.outputs += outputs
        self.scheduler.beams.finish(group, FinishReason.STOP)
        self._forget_started(group.request.request_id)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int] | None = None,
        logprobs: list[Logprobs] | None = None,
        prompt_logprobs: list[Logprobs] | None = None,
        error: str = "",
        arrays: tuple[NDArray[Any], ...] = (),
    ) -> None:
        group = self.scheduler.beams.of(sequence.request.request_id)
        if group is not None:
            self._finish_beams(group, group.failures(reason, error))
            return
        self.scheduler.finish(sequence, reason)
        self._pending.outputs.append(
            SequenceOutput(
                sequence.request.request_id,
                sequence.sample_index,
                token_ids or [],
                logprobs,
                prompt_logprobs,
                reason,
                sequence.num_cached_tokens,
                sequence.timings(),
                error,
                arrays,
                account=sequence.account,
            )
        )
        self._forget_started(sequence.request.request_id)

    def _forget_started(self, request_id: int) -> None:
        if not self.scheduler.find(request_id):
            self._started.discard(request_id)
