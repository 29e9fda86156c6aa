"""Beam search: the search alone, and its beams among other sequences, every block accounted for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bookkeeping import (
    BLOCK,
    BookkeepingRunner,
    Clock,
    expected,
    expected_answers,
    next_candidates,
    request,
)

from salver.server.engine.beam import BeamSearch, Candidate, beam_capacity, num_candidates
from salver.server.engine.core import EngineCore, EngineLimits, StepResult
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    SequenceOutput,
    StepMessage,
    StoppingParams,
)
from salver.server.engine.schedule import Schedule

LIMITS = EngineLimits(
    num_blocks=41, block_size=BLOCK, max_model_len=96, max_num_seqs=8, max_num_batched_tokens=16,
    check_integrity=True,
)  # fmt: skip


class Sink:
    def __init__(self) -> None:
        self.ends: dict[int, SequenceOutput] = {}
        self.tokens: dict[int, list[int]] = {}

    def put(self, output: SequenceOutput) -> None:
        assert output.sample_index not in self.ends, "an output after the end"
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)
        if output.finish_reason is not None:
            self.ends[output.sample_index] = output

    def started(self, seconds: float) -> None:
        assert seconds >= 0


def logprobs(tokens: tuple[int, ...], vocabulary: int) -> list[float]:
    source = random.Random(f"{tokens}")
    weights = [source.random() + 0.01 for _ in range(vocabulary)]
    return [math.log(weight / sum(weights)) for weight in weights]


def every_output(stop: frozenset[int], most: int, vocabulary: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All outputs that end, with the sum of their log-probabilities."""
    open_outputs: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while open_outputs:
        tokens, total = open_outputs.pop()
        for token, logprob in enumerate(logprobs(tokens, vocabulary)):
            longer = (*tokens, token)
            if token in stop or len(longer) == most:
                yield longer, total + logprob
            else:
                open_outputs.append((longer, total + logprob))


@given(
    st.frozensets(st.integers(0, 2), max_size=2), st.integers(1, 4), st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    st.sampled_from([False, "never"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_search_with_beams_enough_finds_the_best_of_all(
    stop: frozenset[int], most: int, penalty: float, early_stopping: bool | str
) -> None:
    params = BeamParams(100, penalty, early_stopping)
    search = BeamSearch(params, StoppingParams(most, stop_token_ids=stop))
    while not search.ended:
        search.advance(
            [
                [Candidate(token, logprob) for token, logprob in enumerate(logprobs(beam.token_ids, 3))]
                for beam in search.beams
            ]
        )
    best = sorted(every_output(stop, most, 3), key=lambda pair: -pair[1] / len(pair[0]) ** penalty)[:100]
    assert [answer.token_ids for answer in search.answers] == [tokens for tokens, _ in best]
    for answer, (tokens, total) in zip(search.answers, best, strict=True):
        assert answer.score == pytest.approx(total / len(tokens) ** penalty)
        stops = tokens[-1] in stop
        assert answer.reason is (FinishReason.STOP if stops else FinishReason.LENGTH)


def test_early_stopping_decides_when_there_are_answers_enough() -> None:
    """Two ends of 0.4 each at once; the beams behind them become better only when they are long."""

    def steps(early_stopping: bool | str, penalty: float) -> int:
        search = BeamSearch(BeamParams(2, penalty, early_stopping), StoppingParams(9, stop_token_ids={0, 1}))
        for step in itertools.count():
            if search.ended:
                return step
            ends = [Candidate(0, math.log(0.4)), Candidate(1, math.log(0.39))]
            search.advance(
                [[*ends, Candidate(2, math.log(0.2)), Candidate(3, math.log(0.01))]] * len(search.beams)
            )
        raise AssertionError

    assert steps(True, 0.0) == steps(False, 0.0) == steps("never", 0.0) == 1
    assert steps(True, 2.0) == 1
    assert steps("never", 2.0) > steps(False, 2.0) >= 1, "at the end of the tokens a beam may still be better"


def test_what_is_excluded_leaves_fewer_beams_and_answers() -> None:
    search = BeamSearch(BeamParams(3), StoppingParams(2, stop_token_ids=frozenset({9})))
    assert search.advance([[Candidate(4, -1.0)]]) == [(0, 4)]
    assert search.advance([[Candidate(5, -1.0), Candidate(9, -2.0)]]) == []
    assert search.ended
    assert [answer.token_ids for answer in search.answers] == [(4, 5), (4, 9)]
    nothing = BeamSearch(BeamParams(3), StoppingParams(2))
    assert nothing.advance([[]]) == [] and nothing.ended and not nothing.answers


def test_candidates_of_each_beam_hold_all_that_can_matter() -> None:
    params, stopping = BeamParams(3), StoppingParams(6, stop_token_ids=frozenset({0, 1, 2, 3}))
    for seed in range(50):
        whole, cut = BeamSearch(params, stopping), BeamSearch(params, stopping)
        while not whole.ended:
            offered = []
            for beam in whole.beams:
                found = enumerate(logprobs((seed, *beam.token_ids), 12))
                offered.append(sorted((Candidate(t, p) for t, p in found), key=lambda c: -c.logprob))
            most = num_candidates(params, stopping)
            assert whole.advance(offered) == cut.advance([each[:most] for each in offered])
        assert cut.ended and whole.answers == cut.answers


# --- among other sequences ------------------------------------------------------------


searches = st.builds(
    lambda prompt, max_tokens, beams, n, stop, penalty, early, salt, priority, top_k: request(
        0, prompt, max_tokens, min(n, beams), stop=stop, beams=BeamParams(beams, penalty, early),
        cache_salt=salt, priority=priority, prompt_top_k=top_k,
    ),
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(2, 6),
    st.integers(1, 6),
    st.frozensets(st.integers(0, 49), max_size=12),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([True, False, "never"]),
    st.sampled_from(["", "tenant"]),
    st.integers(-1, 1),
    st.sampled_from([None, None, 0]),
)  # fmt: skip
others = st.builds(
    lambda prompt, max_tokens, n: request(0, prompt, max_tokens, n),
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
    st.integers(1, 20),
    st.integers(1, 3),
)


@given(
    st.lists(st.one_of(searches, searches, others), min_size=1, max_size=7), st.integers(17, 41), st.data()
)
@settings(max_examples=60, deadline=None)
def test_answers_are_those_of_the_search_alone(made: list[EngineRequest], blocks: int, data: Any) -> None:
    """However narrow the engine, and whoever is cancelled; blocks are checked after every step."""
    asked = [replace(item, request_id=number) for number, item in enumerate(made, 1)]
    runner = BookkeepingRunner()
    limits = replace(
        LIMITS, num_blocks=blocks, max_num_batched_tokens=data.draw(st.sampled_from([8, 11, 64])),
        enable_prefix_caching=data.draw(st.booleans()),
    )  # fmt: skip
    engine = InlineEngine(runner, limits, clock=Clock())
    sinks = {item.request_id: Sink() for item in asked}
    arrivals = {item.request_id: data.draw(st.integers(0, 10)) for item in asked}
    cancels = {item.request_id: data.draw(st.sampled_from([None] * 5 + [3, 7, 12])) for item in asked}
    for step in range(3000):
        for item in asked:
            if arrivals[item.request_id] == step:
                engine.submit(item, sinks[item.request_id])
            if cancels[item.request_id] == step > arrivals[item.request_id]:
                engine.abort(item.request_id)
                assert not engine.core.scheduler.find(item.request_id)
        if step > 12 and not engine.has_work:
            break
        engine.step()
        scheduler = engine.core.scheduler
        assert len(scheduler.running) + scheduler.beams.reserved <= limits.max_num_seqs
    assert engine.core.pool.num_used == 0 and not engine.core.scheduler.beams.reserved
    assert runner.most_rows <= limits.max_num_batched_tokens
    for item in asked:
        sink = sinks[item.request_id]
        refused = any(end.error for end in sink.ends.values())
        if refused or cancels[item.request_id] is not None:
            continue
        for position, index in enumerate(item.sample_indices):
            assert sink.tokens[index] == expected(item, position)
        if item.beams is not None:
            answers = expected_answers(item)
            assert [sink.ends[i].score for i in item.sample_indices] == [
                answers[i].score for i in item.sample_indices
            ]


def core(runner: BookkeepingRunner | None = None, **limits: Any) -> EngineCore:
    return EngineCore(runner or BookkeepingRunner(), replace(LIMITS, **limits), clock=Clock())


def beams_of(
    number: int, num_beams: int = 4, prompt: int = 10, tokens: int = 12, **more: Any
) -> EngineRequest:
    return request(number, [1] * prompt, tokens, num_beams, beams=BeamParams(num_beams), **more)


def outputs_until_idle(engine: EngineCore) -> list[SequenceOutput]:
    found: list[SequenceOutput] = []
    while engine.has_work:
        message = engine.step()
        assert message is not None
        found += message.outputs
    return found


def test_beams_share_their_prompt_and_copy_only_the_last_block() -> None:
    engine = core(num_blocks=40, max_num_batched_tokens=64)
    copies: list[int] = []
    whole = engine.runner.execute

    def watched(schedule: Schedule) -> StepResult:
        copies.append(len(schedule.copies))
        return whole(schedule)

    engine.runner.execute = watched  # type: ignore[method-assign]
    engine.add(beams_of(1, 4, prompt=3 * BLOCK + 2, tokens=20))
    engine.step()
    assert engine.pool.num_used == 4 + 3, "three full blocks of the prompt, and four of the last"
    tables = [sequence.block_table for sequence in engine.scheduler.find(1)]
    assert len({tuple(table[:3]) for table in tables}) == 1 and len({table[3] for table in tables}) == 4
    outputs_until_idle(engine)
    assert copies[1] == 3 and max(copies) <= 3
    assert 0 in copies[2:], "where a block is full, or each beam has one child, nothing is copied"
    assert engine.pool.num_used == 0


def test_a_search_waits_for_places_for_all_its_beams() -> None:
    engine = core(max_num_seqs=6, max_num_batched_tokens=6)
    engine.add(request(1, [1] * 4, 6, n=3))
    engine.step()
    engine.add(beams_of(2, 4, prompt=20))
    engine.add(request(3, [0] * 4, 3))
    engine.step()
    scheduler = engine.scheduler
    assert [s.request.request_id for s in scheduler.running] == [1, 1, 1]
    while 2 not in {s.request.request_id for s in scheduler.running}:
        engine.step()
    assert scheduler.beams.reserved == 3, "it starts as one, and holds four"
    ends = [o for o in outputs_until_idle(engine) if o.finish_reason is not None]
    assert [o.request_id for o in ends if o.request_id != 1].count(2) == 4


def test_a_deadline_and_a_failing_row_end_all_beams_at_once() -> None:
    engine = core()
    engine.add(beams_of(1, 3, deadline=0.02))
    ends = [o for o in outputs_until_idle(engine) if o.finish_reason is not None]
    assert [(o.sample_index, o.finish_reason) for o in ends] == [(i, FinishReason.DEADLINE) for i in range(3)]
    assert engine.pool.num_used == 0

    class Failing(BookkeepingRunner):
        def execute(self, schedule: Schedule) -> StepResult:
            result = super().execute(schedule)
            rows = [
                r for i, r in zip(schedule.scheduled, result.rows, strict=True) if i.sequence.request.beams
            ]
            if len(rows) > 1:
                rows[1].candidates, rows[1].error = None, "not numbers"
            return result

    engine = core(Failing())
    engine.add(beams_of(1, 3))
    engine.add(request(2, [0, 1, 0], 8))
    found = outputs_until_idle(engine)
    ends = [o for o in found if o.request_id == 1 and o.finish_reason is not None]
    assert [(o.finish_reason, o.error) for o in ends] == [(FinishReason.ERROR, "not numbers")] * 3
    tokens = [token for o in found if o.request_id == 2 for token in o.token_ids]
    assert tokens == expected(request(2, [0, 1, 0], 8), 0) and engine.pool.num_used == 0


def test_the_first_sign_of_life_comes_before_the_answers() -> None:
    """What a dead worker was computing is held until it goes well: a search need not end for that."""
    engine = core()
    engine.add(beams_of(1, 2))
    first = next(m for m in iter(engine.step, None) if isinstance(m, StepMessage) and m.outputs)
    assert [(o.computing, o.token_ids, o.finish_reason) for o in first.outputs] == [(True, [], None)] * 2
    rest = outputs_until_idle(engine)
    assert not any(o.computing for o in rest) and len(rest) == 2


def test_one_answer_less_is_wanted() -> None:
    engine = core()
    engine.add(beams_of(1, 3))
    engine.step()
    engine.abort(1, 1)
    ends = [o for o in outputs_until_idle(engine) if o.finish_reason is not None]
    assert [o.sample_index for o in ends] == [0, 2]
    engine.add(beams_of(2, 3))
    engine.step()
    for index in range(3):
        engine.abort(2, index)
    assert not engine.scheduler.find(2) and engine.pool.num_used == 0 and not engine.has_work


def test_a_search_without_a_token_to_choose_ends_alone() -> None:
    class Excluding(BookkeepingRunner):
        def execute(self, schedule: Schedule) -> StepResult:
            result = super().execute(schedule)
            for item, row in zip(schedule.scheduled, result.rows, strict=True):
                if row.candidates is not None and item.sequence.num_output_tokens >= 2:
                    row.candidates = []
            return result

    engine = core(Excluding())
    engine.add(beams_of(1, 2))
    ends = [o for o in outputs_until_idle(engine) if o.finish_reason is not None]
    assert [(o.finish_reason, o.token_ids, o.score) for o in ends] == [(FinishReason.ABORT, [], None)] * 2
    assert engine.pool.num_used == 0


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (beams_of(1, 9), "9 beams are more than the 8 sequences"),
        (beams_of(1, 8, prompt=10, tokens=40), "50 tokens of 8 beams are more than the cache holds"),
    ],
)
def test_what_can_never_run_is_refused(item: EngineRequest, says: str) -> None:
    engine = core()
    engine.add(item)
    ends = outputs_until_idle(engine)
    assert len(ends) == len(item.sample_indices) and all(says in o.error for o in ends)


def test_the_longest_search_that_is_not_refused_ends_in_the_smallest_cache() -> None:
    for num_beams, prompt in itertools.product((2, 3, 6), (1, 4, 5, 12, 17)):
        held = beam_capacity(prompt, num_beams, 24, BLOCK)
        if held <= prompt:
            continue
        item = beams_of(1, num_beams, prompt, held - prompt)
        engine = core(num_blocks=25)
        engine.add(item)
        ends = [o for o in outputs_until_idle(engine) if o.finish_reason is not None]
        assert [o.token_ids for o in ends] == [list(a.token_ids) for a in expected_answers(item)]
        assert not engine.scheduler.preemptions


def test_all_beams_come_back_together_after_a_preemption() -> None:
    engine = core(num_blocks=20, max_num_batched_tokens=64)
    engine.add(request(1, [1] * 50, 22))
    engine.add(beams_of(2, 3, prompt=6, tokens=20))
    item = beams_of(2, 3, prompt=6, tokens=20)
    seen = set()
    found: list[SequenceOutput] = []
    while engine.has_work:
        message = engine.step()
        running = [s for s in engine.scheduler.running if s.request.request_id == 2]
        seen.add(len(running))
        if message is not None:
            found += message.outputs
    assert engine.scheduler.preemptions >= 1
    ends = [o for o in found if o.request_id == 2 and o.finish_reason is not None]
    assert [o.token_ids for o in ends] == [list(a.token_ids) for a in expected_answers(item)]
    assert ends[0].timings is not None and ends[0].timings.preemptions >= 1
    assert ends[1].timings is not None and ends[1].timings.preemptions == 0, "they are counted once"
    assert seen <= {0, 1, 3}, "never some of them"


def test_candidates_come_from_what_is_in_the_blocks() -> None:
    """That the fake model is one that would notice: other tokens, other candidates."""
    item = beams_of(1, 2)
    assert next_candidates([1, 2], item) != next_candidates([1, 3], item)
