"""A few hundred seeded runs of the simulation, and that it sees what is broken."""

from __future__ import annotations

import pytest
from faults.simulation import Broken, main, simulate

from salver.server.engine import scheduler
from salver.server.engine.core import EngineCore, RowResult, StepResult
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.schedule import Schedule
from salver.server.engine.scheduler import Scheduler


def test_nothing_is_lost_in_a_few_hundred_runs() -> None:
    tried = simulate(seed=0, runs=300)
    for what in (
        *("cancels", "crashes", "preemptions", "died twice", "deadline", "memory", "error", "stop"),
        *("beam answers", "beam preemptions"),
    ):
        assert tried[what] > 20, f"the runs hardly tried {what}: {tried}"


def test_a_source_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "free_source", lambda sequence, pool: None)
    with pytest.raises(Broken):
        simulate(seed=0, runs=300)


def test_a_seed_gives_the_same_run_again() -> None:
    assert simulate(seed=17, runs=3) == simulate(seed=17, runs=3)


def test_a_lost_block_is_seen_and_its_seed_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    release = Scheduler.release

    def forgetful(self: Scheduler, sequence) -> None:
        if len(sequence.block_table) > 3:
            sequence.block_table.pop()
        release(self, sequence)

    monkeypatch.setattr(Scheduler, "release", forgetful)
    assert main(["--seed", "0", "--runs", "20"]) == 1
    assert "IntegrityError" in (said := capsys.readouterr().out) and "--seed 0" in said


def test_a_neighbour_that_fails_for_anothers_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_fail(self: EngineCore, schedule: Schedule) -> StepResult:
        try:
            return self.runner.execute(schedule)
        except OutOfMemory as error:
            return StepResult([RowResult(error=str(error), out_of_memory=True) for _ in schedule.scheduled])

    monkeypatch.setattr(EngineCore, "_execute", all_fail)
    with pytest.raises(Broken, match="neighbour's memory"):
        simulate(seed=0, runs=50)
