"""Steps in flight: the same answers as one after the other, and a device that does not wait for the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bookkeeping import BLOCK, BookkeepingRunner, Clock, expected, next_token, request

from salver.server.engine.core import EngineCore, EngineLimits, RowResult, StepResult
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.inline import InlineEngine
from salver.server.engine.overlap import Flight, OverlappedCore, is_plain
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    SequenceOutput,
)
from salver.server.engine.schedule import Schedule
from salver.server.engine.sequence import PENDING, Sequence, SequenceStatus

LIMITS = EngineLimits(33, BLOCK, 96, 6, 16, check_integrity=True)
HOST, DEVICE = 0.004, 0.010  # seconds of a step


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeFlight:
    def __init__(self, device: FakeDevice, rows: list[RowResult], chosen: dict[Sequence, int]) -> None:
        self.rows, self.chosen = rows, chosen
        self._device = device
        begin = max(device.free_at, device.clock.now)
        self.ready_at = device.free_at = begin + DEVICE

    def result(self) -> StepResult:
        self._device.clock.now = max(self._device.clock.now, self.ready_at)
        return StepResult(self.rows, DEVICE)


class FakeDevice(BookkeepingRunner):
    """Works beside the host, in order; knows the tokens of its last step, which the host does not."""

    def __init__(self, clock: VirtualClock, full_at: int = 0) -> None:
        super().__init__()
        self.clock = clock
        self.free_at = 0.0
        self.launches = 0
        self._full_at = full_at  # every so many launches there is no memory

    def execute(self, schedule: Schedule) -> StepResult:
        assert all(PENDING not in item.sequence.token_ids for item in schedule.scheduled)
        self.clock.now += HOST
        result = super().execute(schedule)
        return FakeFlight(self, result.rows, {}).result()

    def launch(self, schedule: Schedule, previous: Flight | None) -> FakeFlight:
        self.launches += 1
        if self._full_at and self.launches % self._full_at == 0:
            raise OutOfMemory("no memory, as planned")
        self.clock.now += HOST
        known: dict[Sequence, int] = previous.chosen if isinstance(previous, FakeFlight) else {}
        for source, destination in schedule.copies:
            for i in range(BLOCK):
                if source * BLOCK + i in self.slots:
                    self.slots[destination * BLOCK + i] = self.slots[source * BLOCK + i]
        rows: list[RowResult] = []
        chosen: dict[Sequence, int] = {}
        for item in schedule.scheduled:
            for position, token in enumerate(item.token_ids, item.start):
                if token == PENDING:
                    assert position == item.start + item.num_tokens - 1
                    token = known[item.sequence]
                self.slots[self.slot(item.sequence.block_table, position)] = token
        for item in schedule.scheduled:
            row, sequence = RowResult(), item.sequence
            if item.samples:
                read = [self.slots[self.slot(sequence.block_table, p)] for p in range(sequence.num_tokens)]
                chosen[sequence] = next_token(read, sequence.request.sampling.seed, sequence.sample_index)
                row.token_ids = [chosen[sequence]]
            rows.append(row)
        return FakeFlight(self, rows, chosen)


class Sink:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}

    def put(self, output: SequenceOutput) -> None:
        assert output.sample_index not in self.ends, "an output after the end"
        assert PENDING not in output.token_ids
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)
        if output.finish_reason is not None:
            self.ends[output.sample_index] = output.finish_reason

    def started(self, seconds: float) -> None:
        pass


def overlapped(limits: EngineLimits = LIMITS, **fake: Any) -> tuple[InlineEngine, FakeDevice, OverlappedCore]:
    clock = VirtualClock()
    device = FakeDevice(clock, **fake)
    core = OverlappedCore(device, limits, clock=clock)
    return InlineEngine.of(core), device, core


requests = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=40),
    st.integers(1, 30),
    st.integers(1, 4),
    st.frozensets(st.integers(0, 49), max_size=4),
    st.integers(-3, 3),
    st.sampled_from([1.0, 1.0, 1.0, 1.0, 1.3]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(requests, st.integers(0, 6), st.booleans()), min_size=1, max_size=12),
    st.integers(20, 33),
    st.sampled_from([6, 7, 16, 64]),
    st.booleans(),
    st.sampled_from([0, 0, 3, 7]),
    st.randoms(use_true_random=False),
)
def test_every_answer_is_that_of_steps_one_after_the_other(
    arrivals: Any, num_blocks: int, budget: int, caching: bool, full_at: int, rng: Any
) -> None:
    """Crowds, shared prefixes, chunks, samples, stop tokens, preemptions, cancels, penalties, full memory."""
    limits = replace(
        LIMITS, num_blocks=num_blocks, max_num_batched_tokens=budget, enable_prefix_caching=caching
    )
    engine, _, core = overlapped(limits, full_at=full_at)
    sinks: dict[int, Sink] = {}
    items: dict[int, EngineRequest] = {}
    cancelled: set[int] = set()
    for number, ((prompt, max_tokens, n, stop, priority, penalty), pause, cancel) in enumerate(arrivals):
        sampling = SamplingParams(seed=number, repetition_penalty=penalty)
        item = request(number, prompt, max_tokens, n, stop=stop, priority=priority, sampling=sampling)
        items[number], sinks[number] = item, Sink()
        engine.submit(item, sinks[number])
        for _ in range(pause):
            engine.step()
        if cancel and rng.random() < 0.3:
            victim = rng.randrange(number + 1)
            engine.abort(victim)
            cancelled.add(victim)
    engine.run()
    for number, item in items.items():
        for index in item.sample_indices:
            found = sinks[number].tokens.get(index, [])
            whole = expected(item, index)
            if number in cancelled:
                assert found == whole[: len(found)]
            else:
                assert found == whole
    assert core.pool.num_used == 0 and not core.has_work


def test_the_device_never_waits_for_the_host() -> None:
    """A step costs what the device needs, not that and the host's part too."""
    limits = replace(LIMITS, num_blocks=99)  # nobody is preempted
    engine, device, core = overlapped(limits)
    for number in range(4):
        engine.submit(request(number, [1, 2, 3], 50), Sink())
    engine.run()
    steps = core.steps
    assert core.num_overlapped == steps - 1
    assert device.clock.now == pytest.approx(HOST + steps * DEVICE)

    clock = VirtualClock()
    after_each_other = InlineEngine(FakeDevice(clock), limits, clock=clock)
    for number in range(4):
        after_each_other.submit(request(number, [1, 2, 3], 50), Sink())
    after_each_other.run()
    assert clock.now == pytest.approx(after_each_other.core.steps * (HOST + DEVICE))


def test_an_end_is_seen_one_step_late_and_the_row_dropped() -> None:
    item = request(0, [1, 2, 3], 30)
    stop = expected(item, 0)[4]
    item = request(0, [1, 2, 3], 30, stop=frozenset({stop}))
    engine, device, _ = overlapped()
    sink = Sink()
    engine.submit(item, sink)
    engine.run()
    assert sink.tokens[0] == expected(item, 0) and sink.ends[0] is FinishReason.STOP
    assert device.launches == len(sink.tokens[0]) + 1


def test_no_step_goes_beyond_the_length_of_a_request() -> None:
    engine, device, _ = overlapped()
    sink = Sink()
    engine.submit(request(0, [1, 2, 3], 5), sink)
    engine.run()
    assert len(sink.tokens[0]) == 5 and device.launches == 5


def test_what_needs_the_last_tokens_is_computed_after_them() -> None:
    engine, device, core = overlapped()
    plain, needy = Sink(), Sink()
    engine.submit(request(0, [1, 2, 3], 12), plain)
    for _ in range(4):
        engine.step()
    assert device.launches == 4
    sampling = SamplingParams(seed=1, repetition_penalty=1.2)
    engine.submit(request(1, [4, 5], 4, sampling=sampling), needy)
    engine.run()
    assert plain.tokens[0] == expected(request(0, [1, 2, 3], 12), 0)
    assert needy.tokens[0] == expected(request(1, [4, 5], 4, sampling=sampling), 0)
    assert 4 < device.launches < core.steps  # afterwards steps overlap again


def test_a_leader_that_is_preempted_in_flight_still_leads() -> None:
    """Its prompt is computed, its token not yet read, when its blocks go to others: nothing to share then."""
    engine, _, core = overlapped(replace(LIMITS, num_blocks=7, enable_prefix_caching=False))
    items = [request(0, [1] * 4, 6), request(1, [2] * 4, 6), request(2, [3] * 8, 6, 2)]
    sinks = [Sink() for _ in items]
    for item, sink in zip(items, sinks, strict=True):
        engine.submit(item, sink)
    engine.step()
    engine.step()
    assert core.scheduler.preemptions == 1 and core.scheduler.find(2, 0)[0].num_output_tokens == 1
    assert core.scheduler.find(2, 1)[0].status is SequenceStatus.HELD
    engine.run()
    for item, sink in zip(items, sinks, strict=True):
        assert sink.tokens == {index: expected(item, index) for index in item.sample_indices}


def test_a_deadline_in_flight_ends_the_request() -> None:
    engine, _, _ = overlapped()
    sink = Sink()
    engine.submit(request(0, [1, 2, 3], 90, deadline=0.05), sink)
    engine.run()
    assert sink.ends[0] is FinishReason.DEADLINE
    assert sink.tokens[0] == expected(request(0, [1, 2, 3], 90), 0)[: len(sink.tokens[0])]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": SamplingParams(presence_penalty=0.1)},
        {"sampling": SamplingParams(frequency_penalty=0.1)},
        {"sampling": SamplingParams(bad_words=((1,),))},
        {"sampling": SamplingParams(allowed_words=((1,),))},
        {"sampling": SamplingParams(no_repeat_ngram_size=2)},
        {"grammar": "x"},
        {"output_top_k": 0},
        {"prompt_top_k": 0},
    ],
    ids=str,
)
def test_what_is_not_plain(changes: dict[str, Any]) -> None:
    assert not is_plain(request(0, [1], 1, **changes))
    assert is_plain(request(0, [1], 1, sampling=SamplingParams(top_p=0.9, min_p=0.1, top_k=3)))


def test_a_core_without_overlap_knows_nothing_of_it() -> None:
    core = EngineCore(BookkeepingRunner(), LIMITS, clock=Clock())
    core.add(request(0, [1, 2], 3))
    while core.has_work:
        core.step()
        assert all(PENDING not in s.token_ids for s in core.scheduler.unfinished())
