"""Drafts change the number of steps and nothing else; how many there are, and where they come from."""

from __future__ import annotations

import random
from collections.abc import Sequence as Values
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bookkeeping import BookkeepingRunner, Clock, expected, next_token, request
from unit.test_engine_core import LIMITS, Sink, requests

from salver.server.engine.blocks import BlockPool, IntegrityError
from salver.server.engine.core import StepResult
from salver.server.engine.drafts import Offer, PromptLookup, Speculation, StepCosts
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, FinishReason, StoppingParams
from salver.server.engine.schedule import Schedule
from salver.server.engine.sequence import Sequence

FREE = StepCosts([(1, 1.0), (1000, 1.0)])  # a step takes as long with any number of rows
DEAR = StepCosts([(1, 1.0), (1000, 1000.0)])


class Oracle:
    """Knows the next tokens, and says a wrong one now and then."""

    def __init__(self, rng: random.Random, wrong: float) -> None:
        self.rng, self.wrong = rng, wrong
        self.known: set[Sequence] = set()

    def offer(self, sequence: Sequence, most: int) -> Offer:
        self.known.add(sequence)
        return Offer(self.rng.randint(0, most))

    def propose(self, wanted: Values[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        return [self.guess(sequence, count) for sequence, count in wanted]

    def guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        tokens = list(sequence.token_ids)
        for _ in range(count):
            right = next_token(tokens, sequence.request.sampling.seed, sequence.sample_index)
            tokens.append(right if self.rng.random() >= self.wrong else right + 1)
        return tuple(tokens[sequence.num_tokens :])

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        self.known.discard(sequence)


class CheckingRunner(BookkeepingRunner):
    """Also checks what a draft may not do."""

    def execute(self, schedule: Schedule) -> StepResult:
        for item in schedule.scheduled:
            sequence = item.sequence
            if item.draft:
                assert item.samples
                left = sequence.request.stopping.max_tokens - sequence.num_output_tokens
                assert len(item.draft) < left, "drafts that could never all be taken"
        return super().execute(schedule)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(requests, st.integers(0, 6)), min_size=1, max_size=10),
    st.integers(20, 33),
    st.sampled_from([6, 7, 16, 64]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_every_answer_is_the_one_without_drafts(
    arrivals, num_blocks, budget, caching, wrong, max_drafts, rng
) -> None:
    """Right and wrong drafts in crowds, with forks, preemptions, stops, cancels and deadlines."""
    runner, clock, oracle = CheckingRunner(), Clock(), Oracle(rng, wrong)
    speculation = Speculation(oracle, FREE, max_drafts=max_drafts)
    limits = replace(
        LIMITS, num_blocks=num_blocks, max_num_batched_tokens=budget, enable_prefix_caching=caching
    )
    engine = InlineEngine(runner, limits, clock=clock, speculation=speculation)
    sinks: dict[int, tuple[EngineRequest, Sink]] = {}
    cut: set[int] = set()
    for request_id, (made, gap) in enumerate(arrivals):
        item = replace(made, request_id=request_id, arrival=clock())
        if rng.random() < 0.1:
            item = replace(item, deadline=clock() + 0.02)
        sinks[request_id] = (item, Sink())
        engine.submit(*sinks[request_id])
        for _ in range(gap):
            engine.step()
        if rng.random() < 0.2:
            victim = rng.choice(list(sinks))
            if len(sinks[victim][1].finish) < len(sinks[victim][0].sample_indices):
                cut.add(victim)
                engine.abort(victim)
    engine.run(max_steps=5000)
    assert runner.most_rows <= budget
    assert engine.core.pool.num_used == 0
    assert not oracle.known, "ended sequences are remembered"
    assert 0 <= speculation.num_accepted <= speculation.num_drafts
    for request_id, (item, sink) in sinks.items():
        for position, index in enumerate(item.sample_indices):
            want, got = expected(item, position), sink.tokens.get(index, [])
            end = sink.finish.get(index)
            if request_id in cut or (end and end.finish_reason is FinishReason.DEADLINE):
                assert got == want[: len(got)]
                continue
            assert got == want
            assert end is not None
            stopped = want[-1] in item.stopping.stop_token_ids
            assert end.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def run_one(item: EngineRequest, wrong: float = 0.0, max_drafts: int = 4) -> tuple[Sink, InlineEngine]:
    oracle = Oracle(random.Random(0), wrong)
    oracle.offer = lambda sequence, most: Offer(most)  # type: ignore[method-assign]
    sink = Sink()
    engine = InlineEngine(
        CheckingRunner(), LIMITS, clock=Clock(), speculation=Speculation(oracle, FREE, max_drafts=max_drafts)
    )
    engine.submit(item, sink)
    engine.run(max_steps=200)
    return sink, engine


def test_right_drafts_save_steps() -> None:
    item = request(1, [1, 2, 3], max_tokens=30)
    sink, engine = run_one(item)
    assert sink.tokens[0] == expected(item, 0)
    assert engine.core.steps == 6  # five tokens each
    assert engine.core.generated_tokens == 30
    timings = sink.finish[0].timings
    assert timings is not None and timings.steps == 6


def test_wrong_drafts_cost_no_token_and_no_block() -> None:
    item = request(1, [1, 2, 3], max_tokens=30)
    sink, engine = run_one(item, wrong=1.0)
    assert sink.tokens[0] == expected(item, 0)
    assert engine.core.steps == 30


def test_nothing_behind_a_stop_token_is_told() -> None:
    tokens = expected(request(1, [1, 2, 3], max_tokens=30), 0)
    place = next(i for i in range(6, 30) if tokens[i] not in tokens[:i])
    item = request(1, [1, 2, 3], max_tokens=30, stop=frozenset([tokens[place]]))
    sink, _ = run_one(item, max_drafts=9)
    assert sink.tokens[0] == tokens[: place + 1]
    assert sink.finish[0].finish_reason is FinishReason.STOP


def test_what_was_guessed_wrong_is_not_found_in_the_prefix_cache() -> None:
    """Full blocks of drafts that were wrong would be the wrong tokens' keys under the right digest."""
    item = request(1, [1] * 9, max_tokens=40)
    _, engine = run_one(item, wrong=0.5, max_drafts=9)
    again = request(2, [*item.prompt_token_ids, *expected(item, 0)[:30]], max_tokens=6)
    sink = Sink()
    engine.submit(again, sink)
    engine.run()
    assert sink.finish[0].num_cached_tokens >= 32
    assert sink.tokens[0] == expected(again, 0)  # the runner reads every slot back


def test_blocks_that_come_back_are_the_next_to_go() -> None:
    pool = BlockPool(6, 16)
    table = pool.allocate(4)
    pool.give_back(table[2:])
    pool.check_integrity([table[:2]])
    assert pool.allocate(2) == table[2:]
    pool.share(table[:1])
    with pytest.raises(IntegrityError):
        pool.give_back(table[:1])


# ---- how many ----


class Steady:
    """Always has drafts, of one class."""

    def __init__(self, per_draft: float = 0.0) -> None:
        self.per_draft = per_draft

    def offer(self, sequence: Sequence, most: int) -> Offer:
        return Offer(most)

    def propose(self, wanted: Values[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        return [(0,) * count for _, count in wanted]

    def seconds(self, num_sequences: int) -> float:
        return self.per_draft

    def forget(self, sequence: Sequence) -> None: ...


def sequences(count: int) -> list[Sequence]:
    return [Sequence(request(i, [1, 2, 3]), 0, (), (0, 0.0, 0.0, i, 0)) for i in range(count)]


def counts(speculation: Speculation, among: list[Sequence], budget: int = 1000) -> list[int]:
    rooms = [(sequence, 100) for sequence in among]
    return [len(draft) for draft in speculation.drafts(rooms, len(among), budget)]


def test_free_rows_are_used_and_dear_ones_are_not() -> None:
    assert counts(Speculation(Steady(), FREE, max_drafts=4), sequences(3)) == [4, 4, 4]
    assert counts(Speculation(Steady(), DEAR, max_drafts=4), sequences(3)) == [0, 0, 0]
    assert counts(Speculation(Steady(per_draft=2.0), FREE, max_drafts=4), sequences(3)) == [0, 0, 0]


def test_the_budget_holds_and_shallow_drafts_come_first() -> None:
    assert counts(Speculation(Steady(), FREE, max_drafts=4), sequences(3), budget=4) == [2, 1, 1]


def test_a_full_batch_gets_none_where_a_single_stream_does() -> None:
    """Up to eight rows a step costs nearly the same; beyond, every row costs."""
    costs = StepCosts([(1, 1.0), (8, 1.2), (64, 8.0)])
    assert counts(Speculation(Steady(), costs, max_drafts=4), sequences(1))[0] > 0
    assert not any(counts(Speculation(Steady(), costs, max_drafts=4), sequences(32)))


def test_bad_guesses_end_and_are_tried_again_later() -> None:
    speculation = Speculation(Steady(), StepCosts([(1, 1.0), (2, 1.4), (64, 20.0)]), max_drafts=4)
    (one,) = sequences(1)
    given_up = 0
    tried = [counts(speculation, [one])[0]]
    assert tried[0] > 0
    for _ in range(200):
        if tried[-1]:
            speculation.checked(one, tried[-1], 0)
        tried.append(counts(speculation, [one])[0])
        given_up += tried[-1] == 0
    assert 150 < given_up < 200, "some tries, few of them"
    assert speculation.num_accepted == 0


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts([(4, 2.0), (2, 1.0), (8, 1.5)])
    assert [costs.seconds(rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert StepCosts([(2, 1.0), (4, 2.0)]).seconds(10) == pytest.approx(5.0)
    assert StepCosts([(2, 1.0)]).seconds(4) == 2.0
    with pytest.raises(ValueError, match="no measured steps"):
        StepCosts([])


# ---- what was said before ----


def proposals(tokens: list[int], most: int = 4, grown: PromptLookup | None = None) -> tuple[int, ...]:
    lookup = grown or PromptLookup()
    sequence = Sequence(request(1, tokens), 0, (), (0, 0.0, 0.0, 1, 0))
    offer = lookup.offer(sequence, most)
    return lookup.propose([(sequence, offer.num_drafts)])[0]


def test_what_followed_is_proposed() -> None:
    assert proposals([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == (4, 5, 6, 7)
    assert proposals([1, 2, 3, 4, 9, 2, 3]) == ()
    assert proposals([5]) == ()
    # The longer match, not the later one.
    assert proposals([0, 1, 2, 3, 4, 7, 1, 2, 3, 8, 0, 1, 2, 3], most=1) == (4,)


def test_a_loop_goes_on() -> None:
    assert proposals([1, 2, 3, 1, 2, 3], most=8) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert proposals([7, 7, 7, 7], most=3) == (7, 7, 7)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 79))
def test_a_grown_index_finds_what_a_new_one_finds(tokens, cut) -> None:
    lookup = PromptLookup()
    sequence = Sequence(request(1, tokens[:cut]), 0, (), (0, 0.0, 0.0, 1, 0))
    for token in [*tokens[cut:], None]:
        offer = lookup.offer(sequence, 5)
        grown = lookup.propose([(sequence, offer.num_drafts)])[0]
        assert grown == proposals(list(sequence.token_ids), 5)
        if token is not None:
            sequence.token_ids.append(token)


def test_a_step_looks_at_new_tokens_only() -> None:
    """Counted in tokens read, not in time."""

    class Counting(list[int]):
        read = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            Counting.read += 1
            return super().__getitem__(key)

    lookup = PromptLookup()
    sequence = Sequence(request(1, list(range(5000))), 0, (), (0, 0.0, 0.0, 1, 0))
    sequence.token_ids = Counting(sequence.token_ids)
    lookup.offer(sequence, 4)
    Counting.read = 0
    for token in range(100):
        sequence.token_ids.append(token)
        lookup.offer(sequence, 4)
    assert Counting.read < 100 * 40


def test_min_tokens_and_stop_reach_the_rows_of_drafts() -> None:
    """What a draft's row may choose depends on how many tokens stand before it."""
    stopping = StoppingParams(10, min_tokens=2, stop_token_ids=frozenset([5]))
    runner = pytest.importorskip("salver.server.engine.runner")
    sequence = Sequence(replace(request(1, [1]), stopping=stopping), 0, (3,), (0, 0.0, 0.0, 1, 0))
    rows = runner.sampling_rows(sequence, (7, 8))
    assert [row.output_token_ids for row in rows] == [[3], [3, 7], [3, 7, 8]]
    assert [set(row.banned_token_ids) for row in rows] == [{5}, set(), set()]
    assert runner.agreed([7, 8, 9], (7, 8)) == [7, 8, 9]
    assert runner.agreed([7, 6, 9], (7, 8)) == [7, 6]
    assert runner.agreed([7, -1, 9], (7, 8)) == [7]
    assert runner.agreed([-1], ()) == []
