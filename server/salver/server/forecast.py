"""When would a request end? What the front knows of the engine's load, played forward.

Known are the requests in the engine with their place in its order, how far each one is, and how
long steps take (`step_times`). Of outputs only the limit is known: how often they end before it
is learned. The forecast plays the scheduler's rule: who waits starts in order, when places of the
batch and cache blocks are free; while all places are taken, those that end are followed by others.

It costs a pass over what runs and waits. What it still gets wrong is corrected by the ratio of
the times that requests took to the times that were foretold.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from salver.server.engine.request import NO_DEADLINE, EngineRequest, FinishReason, SequenceOutput, StepMessage
from salver.server.engine.sequence import OrderKey, order_key
from salver.server.step_times import StepTimes

FIRST_OUTPUT = 128.0  # tokens of an output that may end by itself, before any has been seen
RAREST_END = 1e-6  # the least chance of a token to be an output's last
FORGETTING = 0.02  # weight of a new observation of prompts, outputs and drafts
LEARNING = 0.05  # of the time that a request took
FIRST_ERROR = 0.25  # of such a time, before any is known
MIN_CORRECTION, MAX_CORRECTION = 0.5, 2.0
LATE = 0.05  # seconds: a request that is given up so shortly before its deadline has missed it


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now to a request's first token and to its end."""

    first_token: float
    end: float


@dataclass(slots=True)
class _Entry:
    """A request in the engine."""

    request: EngineRequest
    key: OrderKey
    deadline: float
    output: float  # tokens expected of each sample, when it came
    cache_tokens: float  # that each sample will hold
    prefill: float  # prompt tokens that are still to be computed
    tokens: dict[int, int]  # that each unfinished sample has given
    submitted: float
    foretold: float | None = None  # seconds from then on, uncorrected
    started: bool = False

    @property
    def places(self) -> int:
        """Sequences of the batch that it has or will have."""
        return len(self.tokens) if self.request.beams is None else self.request.num_places


def _key_of(item: tuple[OrderKey, _Entry]) -> OrderKey:
    return item[0]


@dataclass(slots=True)
class _Line:
    """A simulation under way: sequences that hold places, by the step in which they end."""

    slowest: float  # seconds of a step while all places are taken
    ends: list[tuple[float, float]] = field(default_factory=list)  # a heap: (step, cache tokens)
    held: float = 0.0  # cache tokens
    step: float = 0.0
    seconds: float = 0.0


class _Mean:
    """Of everything seen at first, and then of the latest, older ones counting less and less."""

    __slots__ = ("_count", "value")

    def __init__(self, value: float) -> None:
        self.value = value  # until something is seen
        self._count = 0

    def add(self, value: float) -> None:
        self._count += 1
        if self._count == 1:
            self.value = value
        else:
            self.value += max(FORGETTING, 1 / self._count) * (value - self.value)


class Forecast:
    """Told of every request and step, it says when a further request would end.

    `places` (sequences computed at once), `cache_tokens` and `block_size` are set once the model is
    loaded; until then, and until some steps were measured, it knows nothing and says so.
    """

    def __init__(self, clock: Callable[[], float], priority_interval: float = 1.0) -> None:
        self.places = 0
        self.cache_tokens = 0
        self.block_size = 1
        self.times = StepTimes()
        self._clock = clock
        self._interval = priority_interval
        self._entries: dict[int, _Entry] = {}
        self._waiting: list[tuple[OrderKey, _Entry]] = []  # sorted
        self._running: dict[int, _Entry] = {}
        self._ends_early = 1 / FIRST_OUTPUT  # chance that a token is an output's last
        self._pace = 1.0  # tokens that a step gives a sequence: more than one with drafts
        self._prompt = _Mean(0.0)  # tokens of prompts
        self._chunk = _Mean(math.inf)  # prompt tokens of a step that computes some
        self._computed = _Mean(1.0)  # of a prompt, the part that is not in the prefix cache
        self._took = self._foretold = self._error = 0.0  # seconds, smoothed

    # --- what happens ------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._entries

    def entered(self, request: EngineRequest, foretold: float | None = None) -> None:
        """A request was given to the engine; `foretold` is what `estimate` said of its end."""
        entry = self._entry(request)
        entry.foretold = foretold
        self._entries[request.request_id] = entry
        insort(self._waiting, (entry.key, entry), key=_key_of)
        self._prompt.add(request.num_input_tokens)

    def started(self, request_id: int) -> None:
        """The engine began to compute it."""
        entry = self._entries.get(request_id)
        if entry is not None and not entry.started:
            entry.started = True
            del self._waiting[bisect_left(self._waiting, entry.key, key=_key_of)]
            self._running[request_id] = entry

    def took(self, output: SequenceOutput) -> None:
        """A step gave a sample tokens, or ended it."""
        entry = self._entries.get(output.request_id)
        if entry is None or output.sample_index not in entry.tokens:
            return
        if num_tokens := len(output.token_ids):
            if not entry.tokens[output.sample_index]:
                self._computed.add(1 - output.num_cached_tokens / entry.request.num_input_tokens)
            if entry.request.beams is None:  # the answers of a search come whole
                self._pace += FORGETTING * (num_tokens - self._pace)
            entry.prefill = 0.0
            entry.tokens[output.sample_index] += num_tokens
            if entry.request.stopping.stop_token_ids:
                still = (1 - FORGETTING / FIRST_OUTPUT) ** num_tokens
                self._ends_early = max(RAREST_END, self._ends_early * still)
        if output.finish_reason is not None:
            self.ended(output.request_id, output.sample_index, output.finish_reason)

    def ended(
        self, request_id: int, sample_index: int | None = None, reason: FinishReason | None = None
    ) -> None:
        """A sample, or the whole request, has left the engine; no reason: it was given up."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        samples = [index for index in entry.tokens if sample_index in (None, index)]
        now = self._clock()
        missed = reason is FinishReason.DEADLINE or now >= entry.request.deadline - LATE
        for index in samples:
            del entry.tokens[index]
        if entry.request.stopping.stop_token_ids and reason is not FinishReason.LENGTH and not missed:
            self._ends_early += FORGETTING / FIRST_OUTPUT * len(samples)
        if entry.tokens:
            return
        del self._entries[request_id]
        if entry.started:
            del self._running[request_id]
        else:
            del self._waiting[bisect_left(self._waiting, entry.key, key=_key_of)]
        answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if entry.foretold is not None and (answered or missed):
            self._compare(now - entry.submitted, entry.foretold, missed)

    def stepped(self, message: StepMessage) -> None:
        """The worker computed a step."""
        stats = message.stats
        if stats is None or not stats.num_sequences:
            return
        self.times.observe(stats.num_sequences, stats.num_prefill_tokens, stats.duration)
        left = float(stats.num_prefill_tokens)
        if left:
            self._chunk.add(left)
        for entry in self._running.values():
            if left <= 0:
                break
            taken = min(entry.prefill, left)
            entry.prefill -= taken
            left -= taken

    # --- what will be ------------------------------------------------------------------

    @property
    def correction(self) -> float:
        """Times took so many times what was foretold, the usual error included."""
        if not self._foretold:
            return 1.0 + FIRST_ERROR
        ratio = (self._took + self._error) / self._foretold
        return min(MAX_CORRECTION, max(MIN_CORRECTION, ratio))

    def alone(self, request: EngineRequest) -> Estimate:
        """Of a request that has the engine to itself."""
        entry = self._entry(request)
        first = entry.prefill * self.times.prefill + self.times.seconds(1)
        steps = max(0.0, entry.output / self._pace - 1)
        return Estimate(first, first + steps * self.times.seconds(entry.places))

    def estimate(self, requests: Sequence[EngineRequest]) -> Estimate | None:
        """Of the last of these, which come now together, uncorrected. None while nothing is known."""
        if not self.times.known or not self.places:
            return None
        *others, own = [self._entry(request) for request in requests]
        now = self._clock()
        line = self._line(now)
        place = bisect_left(self._waiting, own.key, key=_key_of)
        self._play(line, (entry for _, entry in self._waiting[:place]), now)
        self._play(line, others, now)
        own.deadline = NO_DEADLINE  # when would it end, if it could?
        self._play(line, [own], now)
        first_token = line.seconds + self.times.seconds(1)
        return Estimate(first_token, self._end_of(line, own))

    # --- inside ------------------------------------------------------------------------

    def _entry(self, request: EngineRequest) -> _Entry:
        tokens = {
            index: len(output) for index, output in zip(request.sample_indices, request.outputs, strict=True)
        }
        resumed = max(tokens.values(), default=0)
        length = request.num_input_tokens
        output = self._output(request, resumed)
        return _Entry(
            request=request,
            key=order_key(request, request.sample_indices[0], self._interval),
            deadline=request.deadline,
            output=output,
            cache_tokens=length + resumed + output + self.block_size,
            prefill=length * self._computed.value + resumed,
            tokens=tokens,
            submitted=self._clock(),
        )

    def _output(self, request: EngineRequest, so_far: int) -> float:
        """Tokens that a sample is still expected to give: each one may be the last."""
        stopping = request.stopping
        left = stopping.max_tokens - so_far
        if left <= 0:
            return 0.0
        if not stopping.stop_token_ids:
            return left
        sure = min(left, max(0, stopping.min_tokens - so_far))
        return sure - math.expm1(-self._ends_early * (left - sure)) / self._ends_early

    def _line(self, now: float) -> _Line:
        """The sequences that hold places now, and the prompts among them that are not yet computed."""
        base, of_sequence, of_prompt = self.times.parameters
        crowd = min(self.places, len(self._running) + len(self._waiting) + 1)
        line = _Line(slowest=max(1e-9, base + crowd * of_sequence))
        prefill = 0.0
        for entry in self._running.values():
            request = entry.request
            prefill += entry.prefill
            left = max(0.0, (entry.deadline - now) / line.slowest)
            # A search ends with all its beams, and its answers have no tokens before.
            so_far_of_each = entry.tokens.values() if request.beams is None else [0] * entry.places
            for so_far in so_far_of_each:
                output = self._output(request, so_far)
                tokens = request.num_input_tokens + so_far + output + self.block_size
                line.ends.append((min(output / self._pace, left), tokens))
                line.held += tokens
        heapq.heapify(line.ends)
        line.step = prefill / self._chunk.value
        line.seconds = prefill * of_prompt + line.step * self.times.seconds(len(line.ends))
        return line

    def _play(self, line: _Line, entries: Iterable[_Entry], now: float) -> None:
        """Starts each of these, in order, as soon as there is room for it. A long queue is walked here."""
        base, of_sequence, of_prompt = self.times.parameters
        steps_of_token = 1 / self._chunk.value
        pop, push, ends = heapq.heappop, heapq.heappush, line.ends
        places, cache_tokens, faster = self.places, self.cache_tokens, 1 / self._pace
        at, seconds, held = line.step, line.seconds, line.held
        for entry in entries:
            count, tokens = entry.places, entry.cache_tokens
            while ends and (len(ends) + count > places or held + count * tokens > cache_tokens):
                step, freed = pop(ends)
                held -= freed
                if step > at:
                    seconds += (step - at) * (base + (len(ends) + 1) * of_sequence)
                    at = step
            left = (entry.deadline - now - seconds) / line.slowest
            if left <= 0:
                continue  # dropped in the queue
            steps = entry.prefill * steps_of_token
            seconds += entry.prefill * of_prompt + steps * (base + len(ends) * of_sequence)
            at += steps
            end = at + min(entry.output * faster, left)
            for _ in range(count):
                push(ends, (end, tokens))
            held += count * tokens
        line.step, line.seconds, line.held = at, seconds, held

    def _end_of(self, line: _Line, own: _Entry) -> float:
        """Seconds until `own`, which was started last, has ended.

        Who ends before is followed by another, whose prompt delays everybody: the load stays as it is.
        """
        steps = max(1.0, own.output / self._pace)
        followers = sum(step < line.step + steps for step, _ in line.ends)
        prompts = followers * self._prompt.value * self._computed.value * self.times.prefill
        return line.seconds + steps * self.times.seconds(len(line.ends)) + prompts

    def _compare(self, took: float, foretold: float, missed: bool) -> None:
        """Learns from a request that has ended. One that was cut by its deadline would have taken longer."""
        if not self._foretold:
            self._took = self._foretold = foretold
            self._error = FIRST_ERROR * foretold
        ratio = self._took / self._foretold
        if missed and took < ratio * foretold:
            return
        self._took += LEARNING * (took - self._took)
        self._foretold += LEARNING * (foretold - self._foretold)
        self._error += LEARNING * (abs(took - ratio * foretold) - self._error)
