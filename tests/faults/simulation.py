"""The engine under a virtual clock: everything that may happen to it, drawn from one seed.

    PYTHONPATH=tests python -m faults.simulation --seed 7 --runs 100

Requests arrive, are cancelled, run into deadlines, are preempted, find no memory, lose their worker
and go on in the next one as `EngineProcess` has them go on. After every step the invariants are
checked; a run that breaks one prints its seed, and the same seed gives the same run again.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from support.bookkeeping import BLOCK, BookkeepingRunner, expected, request

from salver.server.engine.beam import beam_capacity
from salver.server.engine.core import EngineLimits, StepResult
from salver.server.engine.errors import EngineError, OutOfMemory
from salver.server.engine.inline import InlineEngine
from salver.server.engine.process import MAX_DEATHS, _InFlight
from salver.server.engine.request import (
    NO_DEADLINE,
    BeamParams,
    EngineRequest,
    FinishReason,
    SequenceOutput,
)
from salver.server.engine.schedule import Schedule

MAX_STEPS = 3000  # of a run; the longest needs a few hundred
MAX_SOURCE = 24


class Broken(AssertionError):
    """An invariant does not hold."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class FaultyRunner(BookkeepingRunner):
    """Takes time; finds no memory for steps above `room` rows, nor ever for the requests in `greedy`."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        self.room = sys.maxsize

    def execute(self, schedule: Schedule) -> StepResult:
        simulation = self._simulation
        simulation.now += simulation.rng.uniform(0.001, 0.05)
        greedy = any(item.sequence.request.request_id in simulation.greedy for item in schedule.scheduled)
        too_many = schedule.num_tokens > self.room and len(schedule.scheduled) > 1
        if greedy or too_many:
            # The device may have come half way: the copies are made and keys of some rows written.
            if simulation.rng.random() < 0.5:
                super().execute(schedule)
            simulation.count["out of memory"] += 1
            raise OutOfMemory("no memory, as planned")
        result = super().execute(schedule)
        for item, row in zip(schedule.scheduled, result.rows, strict=True):
            if item.sequence.request.request_id in simulation.poisoned and (row.token_ids or row.candidates):
                row.token_ids, row.candidates, row.error = [], None, "not numbers, as planned"
        return result


@dataclass
class Call:
    """One request as its client and the front see it."""

    request: EngineRequest
    simulation: Simulation
    entry: _InFlight = field(init=False)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    cancelled: bool = False
    failed: EngineError | None = None
    started_at: float | None = None

    def __post_init__(self) -> None:
        self.entry = _InFlight(self.request, self)
        positions = enumerate(self.request.sample_indices)
        self.expected = {index: expected(self.request, position) for position, index in positions}

    @property
    def ended(self) -> bool:
        return self.cancelled or self.failed is not None or len(self.finished) == len(self.expected)

    def started(self, seconds: float) -> None:
        check(seconds >= 0, "a request waited for less than no time")
        if self.started_at is None:
            self.started_at = self.simulation.now
            self.simulation.check_overtaking(self)

    def put(self, output: SequenceOutput) -> None:
        """As EngineProcess does it; and nothing comes after an end, nothing wrong, nothing twice."""
        name = f"request {output.request_id}, sample {output.sample_index}"
        check(not self.cancelled and self.failed is None, f"{name}: an output after the end of the request")
        check(output.sample_index not in self.finished, f"{name}: an output after its end")
        so_far = self.tokens.setdefault(output.sample_index, [])
        so_far += output.token_ids
        right = self.expected[output.sample_index]
        check(so_far == right[: len(so_far)], f"{name}: {so_far} is not the undisturbed {right}")
        self.prompt += [entry.token_id for entry in output.prompt_logprobs or []]
        entry = self.entry
        entry.tokens[output.sample_index] += output.token_ids
        entry.prompt_logprobs += len(output.prompt_logprobs or [])
        reason = output.finish_reason
        if reason is None:
            return
        self.finished[output.sample_index] = reason
        del entry.tokens[output.sample_index]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            check(so_far == right, f"{name}: ended with {len(so_far)} of {len(right)} tokens")
            if self.request.beams is not None:
                self.simulation.count["beam answers"] += 1
                if output.timings is not None and output.timings.preemptions:
                    self.simulation.count["beam preemptions"] += 1
        elif reason is FinishReason.DEADLINE:
            check(self.request.deadline <= self.simulation.now, f"{name}: its deadline has not passed")
        elif reason is FinishReason.MEMORY:
            check(output.request_id in self.simulation.greedy, f"{name}: failed for a neighbour's memory")
        else:
            check(output.request_id in self.simulation.poisoned, f"{name}: failed for nothing")

    def fail(self, error: EngineError) -> None:
        check(not self.ended, f"request {self.request.request_id} failed after its end")
        self.failed = error


class Simulation:
    """One run; everything in it follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.count: Counter[str] = Counter()
        self.greedy: set[int] = set()
        self.poisoned: set[int] = set()
        self.reads_sources = rng.random() < 0.3  # as encoder-decoders do
        self.limits = EngineLimits(
            num_blocks=rng.randint(20, 34) + (MAX_SOURCE // BLOCK if self.reads_sources else 0),
            max_source_len=MAX_SOURCE if self.reads_sources else 0,
            block_size=BLOCK,
            max_model_len=96,
            max_num_seqs=6,
            max_num_batched_tokens=rng.choice([6, 7, 16, 64]),
            enable_prefix_caching=rng.random() < 0.7,
            check_integrity=True,
        )
        self.calls: dict[int, Call] = {}
        self.crash_share = rng.choice([0.0, 0.0, 0.01, 0.05])
        self.cancel_share = rng.choice([0.0, 0.02, 0.1])
        self.engine = self._new_engine()
        arrivals = sorted(rng.uniform(0, rng.choice([0.1, 2.0, 6.0])) for _ in range(rng.randint(3, 24)))
        self.arrivals = list(enumerate(arrivals, 1))

    def _new_engine(self) -> InlineEngine:
        self.runner = FaultyRunner(self)
        if self.rng.random() < 0.2:
            self.runner.room = self.rng.randint(4, 24)
        return InlineEngine(self.runner, self.limits, clock=lambda: self.now)

    def _make(self, request_id: int, arrival: float) -> EngineRequest:
        rng = self.rng
        if rng.random() < 0.04:
            self.greedy.add(request_id)
        elif rng.random() < 0.04:
            self.poisoned.add(request_id)
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 40))]  # few tokens: prefixes are shared
        max_tokens, n = rng.randint(1, 30), rng.choice([1, 1, 1, 2, 5])
        beams = self._make_beams() if rng.random() < 0.35 else None
        if beams is not None:
            n = rng.randint(1, beams.num_beams)
            blocks = self.limits.num_blocks - 1 - self.limits.max_source_len // BLOCK
            most = beam_capacity(len(prompt), beams.num_beams, blocks, BLOCK)
            if most <= len(prompt):
                prompt, most = prompt[: BLOCK - 1], BLOCK
            max_tokens = min(max_tokens, most - len(prompt))
        return request(
            request_id,
            prompt,
            max_tokens,
            n,
            beams=beams,
            source_token_ids=self._source(),
            stop=frozenset(rng.sample(range(50), rng.randint(0, 3))),
            cache_salt=rng.choice(["", "", "tenant"]),
            priority=rng.randint(-3, 3),
            arrival=arrival,
            deadline=arrival + rng.uniform(0.05, 3.0) if rng.random() < 0.25 else NO_DEADLINE,
            prompt_top_k=0 if rng.random() < 0.15 else None,
        )

    def _source(self) -> tuple[int, ...]:
        """Often one that was asked before."""
        if not self.reads_sources:
            return ()
        return (self.rng.randint(0, 1),) * self.rng.choice([1, 4, 7, 16, MAX_SOURCE])

    def _make_beams(self) -> BeamParams:
        early_stopping: bool | str = self.rng.choice([True, False, "never"])
        return BeamParams(self.rng.randint(2, 6), self.rng.choice([-1.0, 0.0, 1.0, 2.0]), early_stopping)

    def run(self) -> None:
        """Raises Broken, or whatever the engine raises."""
        for _ in range(MAX_STEPS):
            self._arrive()
            if not self.engine.has_work:
                if not self.arrivals:
                    break
                self.now = max(self.now, self.arrivals[0][1])
                continue
            self._disturb()
            begin = self.now
            self.engine.step()
            self.count["steps"] += 1
            self._check_step(begin)
        else:
            raise Broken(f"not done after {MAX_STEPS} steps")
        self._check_end()

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][1] <= self.now:
            request_id, arrival = self.arrivals.pop(0)
            call = self.calls[request_id] = Call(self._make(request_id, arrival), self)
            self.count["requests"] += 1
            self.engine.submit(call.request, call)

    def _disturb(self) -> None:
        rng = self.rng
        running = [call for call in self.calls.values() if not call.ended]
        if running and rng.random() < self.cancel_share:
            victim = rng.choice(running)
            victim.cancelled = True
            self.engine.abort(victim.request.request_id)
            self.count["cancels"] += 1
            held = self.engine.core.scheduler.find(victim.request.request_id)
            check(not held, "a cancelled request holds something")
        if rng.random() < self.crash_share:
            self._crash()

    def _crash(self) -> None:
        """The worker dies, often with a step computed and not told; what died twice has failed."""
        self.count["crashes"] += 1
        self.count["preemptions"] += self.engine.core.scheduler.preemptions
        if self.rng.random() < 0.5:
            self.engine.core.step()
        self.now += self.rng.uniform(0.0, 0.5)
        self.engine = self._new_engine()
        for call in self.calls.values():
            if call.ended:
                continue
            call.entry.deaths += 1
            if call.entry.deaths >= MAX_DEATHS:
                call.fail(EngineError("died twice"))
                self.count["died twice"] += 1
            else:
                self.engine.submit(call.entry.rest(), call)

    def _check_step(self, begin: float) -> None:
        scheduler, limits = self.engine.core.scheduler, self.limits
        scheduler.check_integrity()
        check(len(scheduler.running) <= limits.max_num_seqs, "too many sequences run")
        # A source is read whole, in a step of its own kind where it is longer than the budget.
        most = limits.max_num_batched_tokens + limits.max_source_len
        check(self.runner.most_rows <= most, "a step above the token budget")
        for sequence in scheduler.unfinished():
            holds = bool(sequence.cross_table)
            reads = sequence in scheduler.running and self.reads_sources
            if sequence.request.beams is None or reads:  # beams have their blocks while they are held
                check(holds == reads, "a source is held by who does not run, or missing to who does")
            call = self.calls[sequence.request.request_id]
            check(not call.ended, f"request {sequence.request.request_id} ended and holds something")
            check(sequence.request.deadline > begin, "a deadline has passed and the request goes on")
        for call in self.calls.values():
            if not call.ended:
                check(bool(scheduler.find(call.request.request_id)), "a request is lost")

    def check_overtaking(self, first: Call) -> None:
        """What starts now was not younger, by as many intervals as it has levels more, than what waits."""
        for waiting in self.calls.values():
            if waiting.ended or waiting.started_at is not None:
                continue
            if (
                waiting.request.deadline <= self.now
            ):  # it was dropped in this step, which is told after starts
                continue
            levels = first.request.priority - waiting.request.priority + 1
            younger = first.request.arrival - waiting.request.arrival
            bound = max(0, levels) * self.limits.priority_interval
            check(
                younger <= 0 or younger < bound,
                f"request {waiting.request.request_id} was overtaken by {first.request.request_id}",
            )

    def _check_end(self) -> None:
        core = self.engine.core
        check(core.pool.num_used == 0, f"{core.pool.num_used} blocks are still owned")
        check(core.scheduler.num_waiting == 0 and not core.scheduler.running, "a queue is not empty")
        self.count["preemptions"] += core.scheduler.preemptions
        for request_id, call in self.calls.items():
            check(call.ended, f"request {request_id} never ended")
            for reason in call.finished.values():
                self.count[reason.value] += 1
            complete = {FinishReason.STOP, FinishReason.LENGTH} >= set(call.finished.values())
            if call.request.prompt_top_k is not None and complete and not (call.cancelled or call.failed):
                told = call.prompt == list(call.request.prompt_token_ids[1:])
                check(told, f"request {request_id}: the prompt's log-probabilities are {call.prompt}")


def simulate(seed: int, runs: int) -> Counter[str]:
    """Runs the seeds from `seed` on; what was tried. Raises Broken, naming the seed."""
    tried: Counter[str] = Counter()
    for run in range(seed, seed + runs):
        simulation = Simulation(run)
        try:
            simulation.run()
        except Exception as error:
            again = f"PYTHONPATH=tests python -m faults.simulation --seed {run} --runs 1"
            raise Broken(f"seed {run} at {simulation.now:.3f} s: {error!r}; again by: {again}") from error
        tried += simulation.count
        tried["runs"] += 1
    return tried


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.simulation", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--runs", type=int, default=2000)
    arguments = parser.parse_args(argv)
    try:
        tried = simulate(arguments.seed, arguments.runs)
    except Broken as error:
        print(f"BROKEN: {error}")
        return 1
    print("simulation: " + ", ".join(f"{count} {what}" for what, count in sorted(tried.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
