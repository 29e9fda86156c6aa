"""When a request would end: the speed of steps, the order, the load; and what is refused for it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.overload import Load, VirtualClock

from salver.server.admission import Admission
from salver.server.engine.request import (
    NO_DEADLINE,
    EngineRequest,
    FinishReason,
    Ready,
    SamplingParams,
    SequenceOutput,
    StepMessage,
    StepStats,
    StoppingParams,
)
from salver.server.rpc.errors import ApiError
from salver.server.step_times import ENOUGH_STEPS, StepTimes

BASE, OF_SEQUENCE, OF_PROMPT = 0.01, 0.002, 0.001


def formula(num_sequences: int, num_prefill_tokens: int) -> float:
    return BASE + OF_SEQUENCE * num_sequences + OF_PROMPT * num_prefill_tokens


def request(
    number: int,
    prompt: int = 10,
    output: int = 10,
    n: int = 1,
    stops: frozenset[int] = frozenset(),
    **changes: Any,
) -> EngineRequest:
    return EngineRequest(
        number,
        (7,) * prompt,
        SamplingParams(),
        StoppingParams(output, stop_token_ids=stops),
        sample_indices=tuple(range(n)),
        outputs=((),) * n,
        **changes,
    )


def stepped(num_sequences: int, num_prefill_tokens: int) -> StepMessage:
    seconds = formula(num_sequences, num_prefill_tokens)
    stats = StepStats(num_sequences + num_prefill_tokens, num_sequences, seconds, seconds, num_prefill_tokens)
    return StepMessage([], [], stats)


def tokens(request_id: int, count: int, reason: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput(request_id, 0, [7] * count, finish_reason=reason)


class Engine:
    """An admission that has seen steps as `formula` says, with so many places."""

    def __init__(self, places: int = 2, cache_tokens: int = 10_000, steps: int = 300) -> None:
        self.clock = VirtualClock()
        self.refusals: list[str] = []
        self.admission = Admission(1000, 10**6, self.refusals.append, clock=self.clock)
        self.admission.ready(
            Ready("cpu", "float32", "", "", "", 1, cache_tokens // 16 + 1, 16, 2048, places, 64, ())
        )
        self.forecast = self.admission.forecast
        rng = random.Random(0)
        for _ in range(steps):
            self.forecast.stepped(stepped(rng.randint(1, places), rng.choice([0, 0, 20])))

    def end_of(self, item: EngineRequest) -> float:
        estimate = self.forecast.estimate([item])
        assert estimate is not None
        return estimate.end

    def runs(self, item: EngineRequest) -> None:
        """It was started and its prompt is computed."""
        self.forecast.entered(item)
        self.forecast.started(item.request_id)
        self.forecast.took(tokens(item.request_id, 1))


def test_the_speed_of_steps_is_learned() -> None:
    times, rng = StepTimes(), random.Random(1)
    for _ in range(500):
        shape = rng.randint(1, 16), rng.choice([0, 0, 10, 100])
        times.observe(*shape, formula(*shape) * rng.lognormvariate(0, 0.1))
    assert times.seconds(4) == pytest.approx(formula(4, 0), rel=0.15)
    assert times.seconds(16) == pytest.approx(formula(16, 0), rel=0.15)
    assert times.prefill == pytest.approx(OF_PROMPT, rel=0.15)


def test_what_the_load_says_nothing_of_is_kept() -> None:
    times, rng = StepTimes(), random.Random(1)
    for step in range(3000):
        shape = (rng.randint(1, 16), rng.choice([0, 50])) if step < 300 else (1, 0)
        times.observe(*shape, formula(*shape))
    assert times.seconds(16) == pytest.approx(formula(16, 0), rel=0.3)
    assert times.prefill == pytest.approx(OF_PROMPT, rel=0.3)


def test_a_slower_machine_is_noticed_and_one_standstill_is_not() -> None:
    times = StepTimes()
    for _ in range(200):
        times.observe(4, 0, 0.02)
    times.observe(4, 0, 30.0)
    assert times.seconds(4) < 0.06
    for _ in range(100):
        times.observe(4, 0, 0.2)
    assert times.seconds(4) == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3000), st.floats(0, 100)), max_size=60))
def test_no_steps_give_a_speed_that_is_none(steps: list[tuple[int, int, float]]) -> None:
    times = StepTimes()
    for step in steps:
        times.observe(*step)
    assert min(times.parameters) >= 0 and max(times.parameters) < 1e6


def test_alone_and_behind_others() -> None:
    engine = Engine(places=1)
    alone = engine.end_of(request(1, output=100))
    assert alone == pytest.approx(engine.forecast.alone(request(1, output=100)).end, rel=0.1)
    engine.runs(request(1, output=100))
    behind = engine.end_of(request(2, output=100))
    engine.forecast.entered(request(2, output=100))
    assert behind == pytest.approx(2 * alone, rel=0.15)
    assert engine.end_of(request(3, output=100)) == pytest.approx(3 * alone, rel=0.15)
    first = engine.end_of(request(3, output=100, priority=2))  # it overtakes what waits, not what runs
    assert first == pytest.approx(2 * alone, rel=0.15)


def test_what_has_been_computed_is_not_waited_for() -> None:
    engine = Engine(places=1)
    engine.runs(request(1, output=100))
    before = engine.end_of(request(2))
    engine.forecast.took(tokens(1, 90))
    after = engine.end_of(request(2))
    assert before - after == pytest.approx(90 * formula(1, 0), rel=0.2)
    engine.forecast.took(tokens(1, 9, FinishReason.LENGTH))
    assert engine.end_of(request(2)) < after and engine.forecast.idle


def test_the_cache_is_a_bound_too() -> None:
    roomy, tight = Engine(places=8), Engine(places=8, cache_tokens=200)
    for engine in roomy, tight:
        engine.runs(request(1, prompt=100, output=50))
    assert tight.end_of(request(2, prompt=100, output=10)) > 2 * roomy.end_of(
        request(2, prompt=100, output=10)
    )


def test_where_outputs_end_is_learned() -> None:
    engine, stops = Engine(places=1), frozenset({1})
    before = engine.end_of(request(0, output=1000, stops=stops))
    for number in range(1, 1200):
        engine.runs(request(number, output=1000, stops=stops))
        for _ in range(18):
            engine.forecast.took(tokens(number, 1))
        engine.forecast.took(tokens(number, 1, FinishReason.STOP))
    after = engine.end_of(request(0, output=1000, stops=stops))
    assert after == pytest.approx(20 * formula(1, 0), rel=0.3) and after < before / 3
    assert engine.end_of(request(0, output=1000)) > 10 * after  # one that cannot end by itself


def test_the_forecast_is_corrected_by_what_requests_took() -> None:
    engine = Engine(places=1)
    for number in range(1, 200):
        item = request(number, arrival=engine.clock.now)
        engine.forecast.entered(item, foretold=1.0)
        engine.clock.now += 1.5
        engine.forecast.took(tokens(number, 10, FinishReason.LENGTH))
    assert engine.forecast.correction == pytest.approx(1.5, rel=0.1)
    for number in range(200, 400):  # cut by their deadlines: who knows how long they would have taken
        engine.forecast.entered(request(number, deadline=engine.clock.now + 1.0), foretold=1.0)
        engine.clock.now += 1.0
        engine.forecast.ended(number)
    assert engine.forecast.correction == pytest.approx(1.5, rel=0.1)


shapes = st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 8), st.lists(st.tuples(shapes, st.booleans()), max_size=12), shapes, shapes)
def test_more_load_is_never_an_earlier_end(
    places: int, load: list[tuple[tuple[int, int, int], bool]], more: tuple[int, int, int], own: Any
) -> None:
    engine = Engine(places, cache_tokens=10**6, steps=50)
    room = places
    for number, (shape, runs) in enumerate(load, 1):
        if runs and room >= shape[2]:
            room -= shape[2]
            engine.runs(request(number, *shape))
        else:
            engine.forecast.entered(request(number, *shape))
    engine.forecast._prompt.value = 0.0  # of those to come: more load is less room for them
    before = engine.end_of(request(1000, *own, arrival=engine.clock.now))
    engine.forecast.entered(request(900, *more))
    engine.forecast._prompt.value = 0.0
    after = engine.end_of(request(1000, *own, arrival=engine.clock.now))
    assert after >= before * (1 - 1e-9)
    engine.forecast.ended(900)
    assert engine.end_of(request(1000, *own, arrival=engine.clock.now)) == pytest.approx(before)


@given(shapes, st.floats(0.001, 1.0))
def test_an_idle_engine_refuses_nothing(shape: tuple[int, int, int], deadline: float) -> None:
    engine = Engine(places=3, steps=50)
    item = request(1, *shape, deadline=engine.clock.now + deadline)
    engine.admission.admit().check_deadline([item])
    assert engine.refusals == []


@given(st.integers(0, ENOUGH_STEPS - 1), st.integers(1, 20))
def test_nothing_is_refused_before_speeds_are_known(steps: int, waiting: int) -> None:
    engine = Engine(places=1, steps=steps)
    for number in range(waiting):
        engine.forecast.entered(request(number, 200, 200))
    engine.admission.admit().check_deadline([request(100, deadline=engine.clock.now + 0.001)])
    assert engine.refusals == []


def test_a_refusal_says_when_to_come_again() -> None:
    engine = Engine(places=1)
    for number in range(5):
        engine.forecast.entered(request(number, output=100))
    now = engine.clock.now
    engine.admission.admit().check_deadline([request(100, arrival=now, deadline=now + 20.0)])
    engine.admission.admit().check_deadline([request(101, arrival=now, deadline=NO_DEADLINE)])
    with pytest.raises(ApiError) as refusal:
        engine.admission.admit().check_deadline([request(100, arrival=now, deadline=now + 4.0)])
    error = refusal.value
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.reason == "DEADLINE_TOO_SHORT"
    assert engine.refusals == ["deadline"] and "4.0 s" in error.message
    # A wait of so long, the load being what it is, is enough.
    assert error.retry_after is not None and 2.0 < error.retry_after < 6.0


def test_a_deadline_that_nobody_could_meet_is_the_clients_wish() -> None:
    """It gets the part that fits, if at least its first token comes in time."""
    engine = Engine(places=1)
    now = engine.clock.now
    engine.forecast.entered(request(1, output=50))  # 0.6 s
    engine.admission.admit().check_deadline([request(2, output=1000, arrival=now, deadline=now + 2.0)])
    with pytest.raises(ApiError):
        engine.admission.admit().check_deadline([request(3, output=1000, arrival=now, deadline=now + 0.5)])
    assert engine.refusals == ["deadline"]


def test_a_stream_that_goes_on_here_is_taken() -> None:
    engine = Engine(places=1)
    now = engine.clock.now
    engine.forecast.entered(request(1, output=500))
    late = request(2, output=50, arrival=now, deadline=now + 1.0)
    engine.admission.admit().check_deadline([replace(late, outputs=((7, 7),))])
    with pytest.raises(ApiError):
        engine.admission.admit().check_deadline([late])


def test_of_requests_that_come_together_the_last_counts() -> None:
    engine = Engine(places=1)
    engine.runs(request(0, output=10))
    many = [request(number, output=100, deadline=engine.clock.now + 4.0) for number in range(1, 9)]
    engine.admission.admit(1).check_deadline(many[:1])
    with pytest.raises(ApiError):
        engine.admission.admit(8).check_deadline(many)


def shape(rng: random.Random) -> tuple[int, int, int, float]:
    output = max(1, int(rng.expovariate(1 / 27)))
    return rng.randint(1, 280), output, 512 if rng.random() < 0.3 else output, 4.0 + 0.12 * output


def test_goodput_holds_under_overload() -> None:
    """The scheduler, the admission and the forecast together; see also `make bench-overload`."""
    rates = (1.5, 2.0, 2.5, 3.0)  # this engine answers about 2.6 such requests a second
    peak = max(Load(seed=1).run(rate, 40.0, 10.0, shape).goodput for rate in rates)
    without = Load(seed=1, deadlines=False).run(2 * peak, 40.0, 10.0, shape)
    assert without.goodput < 0.3 * peak
    for factor in (2, 5):
        outcome = Load(seed=1).run(factor * peak, 40.0, 10.0, shape)
        assert outcome.goodput >= 0.9 * peak, (factor, outcome)
        assert outcome.missed < 0.1 * outcome.good and outcome.longest_queue < 40, (factor, outcome)


def test_who_ends_leaves_nothing_behind() -> None:
    load = Load(seed=2)
    load.run(8.0, 10.0, 0.0, shape)
    while load.engine.has_work:
        load.engine.step()
    admission = load.admission
    assert admission.forecast.idle and not admission.forecast._waiting and not admission.forecast._running
    assert (admission.waiting_requests, admission.waiting_tokens, admission.running_sequences) == (0, 0, 0)
