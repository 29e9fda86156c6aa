"""Scheduler and core with a runner that remembers what each cache slot holds (support/bookkeeping.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bookkeeping import BLOCK, BookkeepingRunner, Clock, expected, request

from salver.server.engine.core import EngineCore, EngineLimits, StepResult
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    SequenceOutput,
)
from salver.server.engine.schedule import Schedule
from salver.server.engine.scheduler import Scheduler

LIMITS = EngineLimits(
    num_blocks=33, block_size=BLOCK, max_model_len=96, max_num_seqs=6, max_num_batched_tokens=16,
    check_integrity=True,
)  # fmt: skip


class Sink:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, SequenceOutput] = {}
        self.prompt_logprobs: list[int] = []
        self.starts = 0

    def put(self, output: SequenceOutput) -> None:
        assert output.sample_index not in self.finish, "an output after the end"
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)
        self.prompt_logprobs += [p.token_id for p in output.prompt_logprobs or []]
        if output.finish_reason is not None:
            self.finish[output.sample_index] = output

    def started(self, seconds: float) -> None:
        assert seconds >= 0
        self.starts += 1


requests = st.builds(
    lambda prompt, max_tokens, n, stop, salt, priority, arrival, prompt_top_k: request(
        0, prompt, max_tokens, n, stop=stop, cache_salt=salt, priority=priority, arrival=arrival,
        prompt_top_k=prompt_top_k,
    ),
    # few distinct tokens, so that prefixes are shared
    st.lists(st.integers(0, 1), min_size=1, max_size=40),
    st.integers(1, 30),
    st.integers(1, 5),
    st.frozensets(st.integers(0, 49), max_size=4),
    st.sampled_from(["", "", "tenant"]),
    st.integers(-3, 3),
    st.just(0.0),
    st.sampled_from([None, None, None, 0]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(requests, st.integers(0, 6)), min_size=1, max_size=14),
    st.integers(20, 33),
    st.sampled_from([6, 7, 16, 64]),
    st.sampled_from([0, 1, 5]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_answer_is_a_function_of_its_request(
    arrivals, num_blocks, budget, tokens_for_one, caching, rng
) -> None:
    """Crowds, shared prefixes, chunks, forks, preemptions and cancels change nobody's tokens."""
    runner, clock = BookkeepingRunner(), Clock()
    limits = replace(
        LIMITS, num_blocks=num_blocks, max_num_batched_tokens=budget, tokens_for_one=tokens_for_one,
        enable_prefix_caching=caching,
    )  # fmt: skip
    engine = InlineEngine(runner, limits, clock=clock)
    sinks: dict[int, tuple[EngineRequest, Sink]] = {}
    aborted: set[int] = set()
    for request_id, (made, gap) in enumerate(arrivals):
        item = replace(made, request_id=request_id, arrival=clock())
        sinks[request_id] = (item, Sink())
        engine.submit(*sinks[request_id])
        for _ in range(gap):
            engine.step()
        if rng.random() < 0.2:
            victim = rng.choice(list(sinks))
            if len(sinks[victim][1].finish) < len(sinks[victim][0].sample_indices):
                aborted.add(victim)
                engine.abort(victim)
    engine.run(max_steps=5000)
    assert runner.most_rows <= budget
    assert engine.core.pool.num_used == 0
    for request_id, (item, sink) in sinks.items():
        for position, index in enumerate(item.sample_indices):
            want = expected(item, position)
            if request_id in aborted:
                got = sink.tokens.get(index, [])
                assert got == want[: len(got)]
                continue
            assert sink.tokens[index] == want
            stopped = want[-1] in item.stopping.stop_token_ids
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            assert sink.finish[index].finish_reason is reason
        if request_id not in aborted:
            assert sink.starts == 1
            if item.prompt_top_k is not None:
                assert sink.prompt_logprobs == list(item.prompt_token_ids[1:])


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(0, 29))
def test_a_resumed_answer_goes_on_with_the_same_tokens(made, cut) -> None:
    item = replace(made, prompt_top_k=None)
    whole = [expected(item, position) for position in range(len(item.sample_indices))]
    had = tuple(tuple(tokens[: min(cut, len(tokens) - 1)]) for tokens in whole)
    engine, sink = InlineEngine(BookkeepingRunner(), LIMITS, clock=Clock()), Sink()
    engine.submit(replace(item, outputs=had), sink)
    engine.run(max_steps=1000)
    for index, tokens in enumerate(whole):
        assert [*had[index], *sink.tokens[index]] == tokens


def test_sixteen_samples_cost_a_tenth_of_a_prefill_more() -> None:
    runner, sink = BookkeepingRunner(), Sink()
    limits = replace(LIMITS, num_blocks=129, max_model_len=256, max_num_seqs=16, enable_prefix_caching=False)
    engine = InlineEngine(runner, limits, clock=Clock())
    engine.submit(request(0, [1] * 200, max_tokens=1, n=16), sink)
    engine.run()
    assert len(sink.finish) == 16
    assert 200 <= runner.rows_computed <= 1.1 * 200


def test_a_request_that_leaves_no_token_to_choose_ends_alone() -> None:
    class Exhausting(BookkeepingRunner):
        def execute(self, schedule: Schedule) -> StepResult:
            result = super().execute(schedule)
            for item, row in zip(schedule.scheduled, result.rows, strict=True):
                if item.sequence.request.request_id == 1 and item.sequence.num_output_tokens == 2:
                    row.token_ids, row.exhausted = [], True
            return result

    engine, sinks = InlineEngine(Exhausting(), LIMITS, clock=Clock()), [Sink(), Sink()]
    items = [request(i, [1, 2, 3]) for i in range(2)]
    for item, sink in zip(items, sinks, strict=True):
        engine.submit(item, sink)
    engine.run()
    assert sinks[0].tokens[0] == expected(items[0], 0)
    assert sinks[1].tokens[0] == expected(items[1], 0)[:2]
    assert sinks[1].finish[0].finish_reason is FinishReason.ABORT
    assert engine.core.pool.num_used == 0


def test_samples_share_one_prefill() -> None:
    runner, sink = BookkeepingRunner(), Sink()
    engine = InlineEngine(runner, replace(LIMITS, enable_prefix_caching=False), clock=Clock())
    engine.submit(request(1, list(range(31)), max_tokens=1, n=6), sink)
    engine.run()
    assert runner.rows_computed == 31 + 5  # each other sample computes the last prompt token alone
    assert len({tuple(t) for t in sink.tokens.values()}) > 1


def test_a_second_request_computes_only_what_is_new() -> None:
    runner = BookkeepingRunner()
    engine = InlineEngine(runner, LIMITS, clock=Clock())
    for request_id in (1, 2):
        sink = Sink()
        engine.submit(request(request_id, list(range(24)), max_tokens=1), sink)
        engine.run()
    assert sink.finish[0].num_cached_tokens == 20  # full blocks but the last token's
    assert runner.rows_computed == 24 + 4
    other = Sink()
    engine.submit(request(3, list(range(24)), max_tokens=1, cache_salt="other"), other)
    engine.run()
    assert other.finish[0].num_cached_tokens == 0


def test_a_long_prompt_leaves_every_stream_its_token() -> None:
    engine = InlineEngine(BookkeepingRunner(), LIMITS, clock=Clock())
    stream = Sink()
    engine.submit(request(1, [1], max_tokens=60), stream)
    engine.step()
    engine.submit(request(2, [2] * 60, max_tokens=4, priority=5), Sink())
    for step in range(2, 6):
        engine.step()
        assert len(stream.tokens[0]) == step


def rows_of_steps(decoding: int, arriving: int, tokens_for_one: int) -> list[int]:
    """Tokens of each step from the arrival of prompts of 40 to one's first token; `decoding` streams run."""
    limits = replace(
        LIMITS, num_blocks=200, max_num_seqs=12, max_num_batched_tokens=48, tokens_for_one=tokens_for_one
    )
    clock = Clock()
    engine = InlineEngine(BookkeepingRunner(), limits, clock=clock)
    for number in range(decoding):
        engine.submit(request(number, [number + 1], max_tokens=60), Sink())
    engine.step()
    clock.now = 5.0
    prompts = [Sink() for _ in range(arriving)]
    for number, sink in enumerate(prompts):
        engine.submit(request(100 + number, [30 + number] * 40, max_tokens=2, arrival=5.0), sink)
    rows = []
    while not any(sink.tokens for sink in prompts):
        message = engine.step()
        assert message is not None and message.stats is not None
        rows.append(message.stats.num_tokens)
        tokens = [o for o in message.outputs if o.request_id < 100]
        assert len(tokens) == decoding  # nobody's stream stops
    return rows


def test_prompts_leave_time_to_those_who_decode() -> None:
    # A step costs what 7 tokens cost, or what 9 streams do: at most three times so many tokens.
    assert rows_of_steps(4, 1, tokens_for_one=7) == [21, 21, 10]
    assert max(rows_of_steps(9, 4, tokens_for_one=7)) == 27
    assert max(rows_of_steps(1, 1, tokens_for_one=7)) == 21


def test_prompts_have_the_whole_step_otherwise() -> None:
    assert rows_of_steps(0, 1, tokens_for_one=7) == [40]
    assert rows_of_steps(4, 3, tokens_for_one=7)[0] == 48  # many wait for their first token
    assert rows_of_steps(4, 1, tokens_for_one=0) == [44]


def test_a_crowd_is_one_to_its_end() -> None:
    """Twelve prompts of 40 in steps of 48: the last ones don't wait for the first ones' tokens."""
    limits = replace(LIMITS, num_blocks=200, max_num_seqs=12, max_num_batched_tokens=48, tokens_for_one=4)
    clock = Clock()
    clock.now = 6.0
    engine = InlineEngine(BookkeepingRunner(), limits, clock=clock)
    sinks = [Sink() for _ in range(12)]
    for number, sink in enumerate(sinks):
        prompt = [30 + number] * 40
        engine.submit(request(number, prompt, max_tokens=40, arrival=5 + number / 20), sink)
    rows = []
    while sum(not sink.tokens for sink in sinks) > 1:
        message = engine.step()
        assert message is not None and message.stats is not None
        rows.append(message.stats.num_tokens)
    assert set(rows[:-1]) == {48}
    message = engine.step()
    assert message is not None and message.stats is not None
    assert message.stats.num_tokens <= 36  # one alone is no crowd


def test_who_waits_without_a_seat_does_not_count() -> None:
    """Twelve seats, eleven taken, many waiting: one prompt at a time comes in, and slowly."""
    assert max(rows_of_steps(11, 30, tokens_for_one=7)) == 33


def test_a_deadline_frees_everything_within_a_step() -> None:
    clock = Clock()
    engine = InlineEngine(BookkeepingRunner(), LIMITS, clock=clock)
    running, waiting = Sink(), Sink()
    engine.submit(request(1, [1] * 9, max_tokens=60, deadline=5.0), running)
    for _ in range(3):
        engine.step()
    engine.submit(request(2, [1] * 9, max_tokens=60, deadline=4.0), waiting)
    clock.now = 6.0
    engine.step()
    assert running.finish[0].finish_reason is FinishReason.DEADLINE
    assert waiting.finish[0].finish_reason is FinishReason.DEADLINE
    assert waiting.starts == 0
    assert engine.core.pool.num_used == 0
    assert not engine.has_work


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (request(1, [1] * 90, max_tokens=7), "context of 96"),
        (request(1, [1] * 70, max_tokens=20), "cache holds (80)"),
    ],
)
def test_what_can_never_run_is_refused(item: EngineRequest, says: str) -> None:
    sink = Sink()
    engine = InlineEngine(BookkeepingRunner(), replace(LIMITS, num_blocks=21), clock=Clock())
    engine.submit(item, sink)
    engine.run()
    assert sink.finish[0].finish_reason is FinishReason.ERROR
    assert says in sink.finish[0].error


def test_preemption_happens_and_is_counted() -> None:
    engine = InlineEngine(BookkeepingRunner(), replace(LIMITS, num_blocks=13), clock=Clock())
    sinks = []
    for request_id in range(3):
        item = request(request_id, [request_id] * 10, max_tokens=30)
        sinks.append((item, Sink()))
        engine.submit(*sinks[-1])
    engine.run()
    assert engine.core.scheduler.preemptions > 0
    for item, sink in sinks:
        assert sink.tokens[0] == expected(item, 0)
    timings = [sink.finish[0].timings for _, sink in sinks]
    assert sum(t.preemptions for t in timings if t) == engine.core.scheduler.preemptions


class FailingRunner(BookkeepingRunner):
    """Fails one request's rows, as NaN logits would."""

    def execute(self, schedule: Schedule) -> StepResult:
        result = super().execute(schedule)
        for item, row in zip(schedule.scheduled, result.rows, strict=True):
            if item.sequence.request.request_id == 1:
                row.token_ids, row.error = [], "broken"
        return result


def test_a_failing_row_fails_alone() -> None:
    engine = InlineEngine(FailingRunner(), LIMITS, clock=Clock())
    bad, good = Sink(), Sink()
    item = request(2, [1, 2, 3])
    engine.submit(request(1, [1, 2, 3]), bad)
    engine.submit(item, good)
    engine.run()
    assert bad.finish[0].finish_reason is FinishReason.ERROR
    assert good.tokens[0] == expected(item, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 0.9)), min_size=2, max_size=30), st.data())
def test_nothing_starves(arrivals, data) -> None:
    """A request is overtaken only by those less than (p' - p + 1) intervals younger (see scheduler)."""
    clock = Clock()
    engine = EngineCore(BookkeepingRunner(), replace(LIMITS, max_num_seqs=1), clock=clock)
    starts: list[int] = []
    made: dict[int, EngineRequest] = {}
    for request_id, (priority, gap) in enumerate(arrivals):
        clock.now += gap
        made[request_id] = request(request_id, [1, 2], 3, priority=priority, arrival=clock.now)
        engine.add(made[request_id])
        for _ in range(data.draw(st.integers(0, 2))):
            message = engine.step()
            starts += [started for started, _ in message.started] if message else []
    while engine.has_work:
        message = engine.step()
        starts += [started for started, _ in message.started] if message else []
    assert sorted(starts) == sorted(made)
    for place, first in enumerate(starts):
        for later in starts[place + 1 :]:
            overtaken, overtaker = made[later], made[first]
            if overtaker.arrival > overtaken.arrival:
                levels = overtaker.priority - overtaken.priority + 1
                assert overtaker.arrival - overtaken.arrival < levels * LIMITS.priority_interval


def test_a_crowded_queue_does_not_slow_a_step() -> None:
    """The work of a step does not grow with the queue: counted in comparisons, not in time."""

    def steps_with(waiting: int) -> int:
        engine = EngineCore(BookkeepingRunner(), replace(LIMITS, check_integrity=False), clock=Clock())
        for request_id in range(waiting):
            engine.add(request(request_id, [1, 2, 3], 50))
        looked = 0
        original = Scheduler._best_waiting

        def counting(self: Scheduler):
            nonlocal looked
            looked += 1
            return original(self)

        Scheduler._best_waiting = counting
        try:
            for _ in range(20):
                engine.step()
        finally:
            Scheduler._best_waiting = original
        return looked

    assert steps_with(3000) == steps_with(30)


def test_a_leader_that_is_cancelled_leaves_the_lead_to_the_next_sample() -> None:
    engine, sink = InlineEngine(BookkeepingRunner(), LIMITS, clock=Clock()), Sink()
    item = request(1, list(range(40)), n=3)
    engine.submit(item, sink)
    engine.step()  # a part of the prompt
    engine.abort(1, 0)
    engine.run(max_steps=100)
    assert 0 not in sink.tokens
    assert [sink.tokens[index] for index in (1, 2)] == [expected(item, 1), expected(item, 2)]


def test_what_several_weights_computed_is_nobody_elses_prefix() -> None:
    engine = InlineEngine(BookkeepingRunner(), LIMITS, clock=Clock())
    prompt = [0, 1] * 20
    kept, first, second = Sink(), Sink(), Sink()
    engine.submit(request(0, prompt, max_tokens=50), kept)
    engine.step()  # a part of the prompt
    assert not kept.tokens
    engine.core.weights_changed()
    while not kept.tokens:
        engine.step()
    engine.submit(request(1, prompt), first)
    while not first.finish:
        engine.step()
    assert first.finish[0].num_cached_tokens == 0
    engine.submit(request(2, prompt), second)
    engine.step()
    (old,), (new,) = engine.core.scheduler.find(0), engine.core.scheduler.find(2)
    assert new.num_cached_tokens > 0
    assert set(new.block_table).isdisjoint(old.block_table)
    engine.run()
    assert kept.tokens[0] == expected(request(0, prompt, max_tokens=50), 0)
