"""Killing and restarting servers loses, repeats and changes no token of a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults.survival import survive
from support.serving import Server


def test_streams_survive(start_server: Callable[..., Server], long_llama: Path) -> None:
    outcomes = survive(start_server, long_llama, streams=16, seed=1, num_servers=2)
    for name, outcome in outcomes.items():
        assert not outcome.wrong, outcome.wrong[0]
        assert outcome.resumptions, f"{name}: nothing was cut, so nothing was tried"
