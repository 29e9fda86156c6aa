"""The blocks of sources: shared, found again, freed; in an engine whose runner keeps the books."""

from __future__ import annotations

from typing import Any

import pytest
from support.bookkeeping import BLOCK, BookkeepingRunner, Clock, expected, request

from salver.server.engine.core import EngineLimits
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, FinishReason, SequenceOutput

LIMITS: dict[str, Any] = {
    "num_blocks": 40, "block_size": BLOCK, "max_model_len": 64, "max_num_seqs": 6,
    "max_num_batched_tokens": 32, "max_source_len": 60, "check_integrity": True,
}  # fmt: skip
SOURCE = tuple(range(10, 23))  # three blocks and a bit


class Taken:
    def __init__(self, asked: EngineRequest) -> None:
        self.asked = asked
        self.tokens: dict[int, list[int]] = {}
        self.reasons: set[FinishReason] = set()
        self.cached = 0
        self.error = ""

    def started(self, seconds: float) -> None: ...

    def put(self, output: SequenceOutput) -> None:
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)
        self.cached = max(self.cached, output.num_cached_tokens)
        self.error += output.error
        if output.finish_reason is not None:
            self.reasons.add(output.finish_reason)

    @property
    def right(self) -> bool:
        return all(self.tokens[i] == expected(self.asked, i) for i in self.asked.sample_indices)


def engine_of(**changes: Any) -> tuple[InlineEngine, BookkeepingRunner]:
    runner = BookkeepingRunner()
    return InlineEngine(runner, EngineLimits(**{**LIMITS, **changes}), clock=Clock()), runner


def ask(engine: InlineEngine, asked: EngineRequest) -> Taken:
    taken = Taken(asked)
    engine.submit(asked, taken)
    return taken


def test_samples_share_their_source() -> None:
    engine, runner = engine_of()
    taken = ask(engine, request(1, [7], 6, 3, source_token_ids=SOURCE))
    engine.step()
    assert engine.core.pool.num_used == 4 + 3  # the source's once, and the first of each sample
    engine.run()
    assert taken.right and engine.core.pool.num_used == 0
    assert runner.rows_computed == len(SOURCE) + 3 * 6, "the source once, and every token of each sample"


def test_a_source_is_found_again_under_its_salt_alone() -> None:
    engine, runner = engine_of()
    for number, (salt, cached) in enumerate([("", 0), ("", len(SOURCE)), ("mine", 0), ("mine", len(SOURCE))]):
        before = runner.rows_computed
        taken = ask(engine, request(number, [7], 5, source_token_ids=SOURCE, cache_salt=salt))
        engine.run()
        assert taken.right and taken.cached == cached
        assert runner.rows_computed - before == 5 + len(SOURCE) - cached
    other = ask(engine, request(9, [7], 5, source_token_ids=(*SOURCE[:-1], 1)))
    engine.run()
    assert other.right and other.cached == 0, "all of a source is seen by all of it: no part of it is found"


def test_without_a_prefix_cache_nothing_is_found() -> None:
    engine, _ = engine_of(enable_prefix_caching=False)
    for number in range(2):
        taken = ask(engine, request(number, [7], 5, source_token_ids=SOURCE))
        engine.run()
        assert taken.right and taken.cached == 0


def test_a_preempted_sequence_gives_its_source_back_and_reads_it_again() -> None:
    engine, _ = engine_of(num_blocks=16, enable_prefix_caching=False)
    taken = [ask(engine, request(n, [7], 24, source_token_ids=SOURCE)) for n in range(3)]
    engine.run()
    assert all(t.right for t in taken) and engine.core.scheduler.preemptions > 0
    assert engine.core.pool.num_used == 0


def test_a_source_longer_than_a_step_goes_alone_of_its_kind() -> None:
    engine, runner = engine_of(max_num_batched_tokens=8)
    taken = [ask(engine, request(n, [7], 3, source_token_ids=(n,) * 50)) for n in (1, 2)]
    engine.step()
    assert runner.rows_computed == 51
    engine.run()
    assert all(t.right for t in taken) and runner.most_rows <= 52


@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_abort_frees_the_source_in_every_state(when: int) -> None:
    engine, _ = engine_of(max_num_seqs=1, max_num_batched_tokens=8)
    kept = ask(engine, request(1, [7], 5, source_token_ids=SOURCE))
    ask(engine, request(2, [7], 40, 2, source_token_ids=SOURCE))
    for _ in range(when * 3):
        engine.step()
    engine.abort(2)
    engine.run()
    assert kept.right and engine.core.pool.num_used == 0


@pytest.mark.parametrize(
    ("changes", "source", "error"),
    [
        ({}, (), "the source is empty"),
        ({}, (1,) * 61, "61 tokens are more than the encoder reads"),
        ({"max_source_len": 0}, (1,), "there is no encoder"),
        ({"num_blocks": 10}, (1,) * 32, "are more than the cache holds"),
    ],
)
def test_what_could_never_run_is_refused(changes: Any, source: tuple[int, ...], error: str) -> None:
    engine, _ = engine_of(**changes)
    taken = ask(engine, request(1, [7], 12, source_token_ids=source))
    engine.run()
    assert taken.reasons == {FinishReason.ERROR} and error in taken.error
