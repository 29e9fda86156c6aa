"""How long each part of a start takes, told as it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_IMPORTED = time.monotonic()


def say(line: str) -> None:
    """To standard output, where whoever starts a server looks."""
    print(line, flush=True)


def process_age() -> float:
    """Seconds since this process was started, where the system tells; else since this module's import."""
    try:
        start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


@dataclass(slots=True)
class StartupPhases:
    """How long each part of the start took; printed as they end, told to `tell` and by GetServerInfo."""

    tell: Callable[[str, float], None]
    done: list[tuple[str, float]] = field(default_factory=list)

    def add(self, name: str, seconds: float) -> None:
        self.done.append((name, seconds))
        self.tell(name, seconds)
        say(f"  {name:<28}{seconds:8.3f} s")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.add(name, time.monotonic() - start)
