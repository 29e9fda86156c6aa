"""A short storm: calls that end early in every way lose nothing of others, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults.storm import FLAGS, METHODS, MOMENTS, storm
from support.serving import Server


def test_what_ends_early_leaves_nothing_and_disturbs_nobody(
    start_server: Callable[..., Server], long_llama: Path
) -> None:
    report = storm(start_server(long_llama, *FLAGS), seed=1, total=160, pause_every=80)
    assert not report.lost, report
    ways = ("cancel", "deadline", "closes", "resets", "falls silent", "streams of killed clients")
    for what in (*ways, *METHODS, *(f"aimed at: {moment}" for moment in MOMENTS), "answers of neighbours"):
        assert report.tried[what] >= 8, report
    assert report.ended["before a token"] > 20 and report.ended["in the output"] > 10, report
