"""An open load on the engine under a virtual clock: seconds of it in a moment, the same every time.

The scheduler, the admission and the forecast are the real ones; a step takes as long as a formula says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from salver.server.admission import Admission, Permit
from salver.server.engine.core import EngineLimits, RowResult, StepResult
from salver.server.engine.errors import EngineError
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Ready,
    SamplingParams,
    SequenceOutput,
    StoppingParams,
)
from salver.server.engine.schedule import Schedule
from salver.server.metrics import Metrics
from salver.server.rpc.errors import ApiError
from salver.server.rpc.submission import Submissions

PLACES, BLOCK, BLOCKS = 32, 16, 547
EOS = 1


class VirtualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class TimedRunner:
    """Gives every sequence token 2 until its output is as long as `lengths` says, then EOS."""

    clock: VirtualClock
    lengths: dict[int, int]
    base: float = 0.012
    per_row: float = 0.0016
    per_key: float = 3e-7
    noise: float = 0.1
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def execute(self, schedule: Schedule) -> StepResult:
        keys = sum(item.num_tokens * (item.start + item.num_tokens / 2) for item in schedule.scheduled)
        seconds = self.base + self.per_row * schedule.num_tokens + self.per_key * keys
        self.clock.now += seconds * self.rng.lognormvariate(0, self.noise)
        rows = []
        for item in schedule.scheduled:
            last = item.sequence.num_output_tokens + 1 >= self.lengths[item.sequence.request.request_id]
            rows.append(RowResult([EOS if last else 2] if item.samples else []))
        return StepResult(rows)


@dataclass
class Outcome:
    """What became of the requests that were to be answered inside the measured time."""

    seconds: float
    sent: int = 0
    good: int = 0
    rejected: int = 0
    missed: int = 0
    longest_queue: int = 0

    @property
    def goodput(self) -> float:
        """Requests answered within their deadline, a second."""
        return self.good / self.seconds


class _Sink:
    def __init__(self, load: Load, request: EngineRequest, permit: Permit) -> None:
        self.load, self.request, self.permit = load, request, permit
        self.completion_tokens = 0

    def started(self, seconds: float) -> None:
        pass

    def put(self, output: SequenceOutput) -> None:
        self.completion_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.load.ended(self, output.finish_reason)

    def fail(self, error: EngineError) -> None:
        raise error


class Load:
    """A server without a network, and who calls it."""

    def __init__(self, *, deadlines: bool = True, seed: int = 0, **runner: Any) -> None:
        self.clock = VirtualClock()
        self.rng = random.Random(seed)
        self.lengths: dict[int, int] = {}
        self.runner = TimedRunner(self.clock, self.lengths, **runner)
        limits = EngineLimits(
            num_blocks=BLOCKS, block_size=BLOCK, max_model_len=2048, max_num_seqs=PLACES,
            max_num_batched_tokens=128, tokens_for_one=8,
        )  # fmt: skip
        self.engine = InlineEngine(self.runner, limits, clock=self.clock)
        self.metrics = Metrics("m")
        self.admission = Admission(
            1024, 1 << 18, self.metrics.rejected, deadlines=deadlines, clock=self.clock
        )
        self.admission.ready(
            Ready("cpu", "float32", "", "", "", 1, BLOCKS, BLOCK, 2048, PLACES, 128, ())
        )  # fmt: skip
        self.outcome = Outcome(1.0)
        self.window = (0.0, 0.0)
        self.number = 0

    def run(self, rate: float, seconds: float, warm_up: float, shape: Any) -> Outcome:
        """Poisson arrivals; `shape(rng)` draws (prompt tokens, output tokens, max_tokens, deadline)."""
        begin = self.clock.now
        self.window = (begin + warm_up, begin + warm_up + seconds)
        self.outcome = Outcome(seconds)
        arrival = begin
        while self.clock.now < self.window[1]:
            while arrival <= self.clock.now:
                self._arrive(arrival, *shape(self.rng))
                arrival += self.rng.expovariate(rate)
            self.outcome.longest_queue = max(self.outcome.longest_queue, self.admission.waiting_requests)
            message = self.engine.step()
            if message is not None:
                self.admission.forecast.stepped(message)
            elif not self.engine.has_work:
                self.clock.now = arrival
        return self.outcome

    def _arrive(self, at: float, prompt: int, output: int, max_tokens: int, deadline: float) -> None:
        self.number += 1
        inside = self.window[0] <= at
        self.outcome.sent += inside
        permit = self.admission.admit()
        stops = frozenset({EOS}) if max_tokens > output else frozenset()
        request = EngineRequest(
            self.number,
            tuple(self.rng.randrange(1000) for _ in range(prompt)),
            SamplingParams(),
            StoppingParams(max_tokens, stop_token_ids=stops),
            deadline=at + deadline,
            arrival=at,
        )
        self.lengths[self.number] = output
        sink = _Sink(self, request, permit)
        try:
            permit.add_tokens(prompt)
            permit.check_deadline((request,))
        except ApiError:
            permit.release()
            self.outcome.rejected += inside
            return
        Submissions(self.engine, self.metrics, permit).submit(request, sink)  # type: ignore[arg-type]

    def ended(self, sink: _Sink, reason: FinishReason) -> None:
        sink.permit.release()
        if self.window[0] <= self.clock.now:
            good = reason is not FinishReason.DEADLINE and self.clock.now <= sink.request.deadline
            self.outcome.good += good
            self.outcome.missed += not good
