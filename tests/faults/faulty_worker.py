"""The real worker, with a runner that does harm where a request's cache_salt asks for it.

The salt is `FAULT:POSITION`, with whatever behind another colon: from so many tokens of output on,

    die      the process is killed while it computes the step
    raise    the step raises what nobody expects
    hang     the step never ends
    memory   the step wants more memory than there is
    nan      the sequence's logits are not numbers
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from salver.server.engine import startup
from salver.server.engine.core import RowResult, StepResult
from salver.server.engine.launching import LaunchingModelRunner
from salver.server.engine.schedule import Schedule
from salver.server.engine.sequence import Sequence
from salver.server.engine.worker import main

FAULTS = ("die", "raise", "hang", "memory", "nan")


def fault_of(sequence: Sequence) -> str | None:
    """What the sequence does to the step that computes it now."""
    fault, _, rest = sequence.request.cache_salt.partition(":")
    if fault not in FAULTS or sequence.num_output_tokens < int(rest.partition(":")[0]):
        return None
    return fault


class FaultyRunner(LaunchingModelRunner):
    """Computes the step, and then the harm: what was computed is lost with it."""

    def _compute(self, schedule: Schedule) -> StepResult:
        faults = {fault_of(item.sequence) for item in schedule.scheduled}
        result = super()._compute(schedule)
        if "memory" in faults:
            torch.empty(1 << 60)
        if "raise" in faults:
            raise ZeroDivisionError("as planned")
        if "hang" in faults:
            time.sleep(3600)
        if "die" in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _sample(
        self,
        schedule: Schedule,
        sampling: list[int],
        logits: torch.Tensor,
        masks: list[Any],
        results: list[RowResult],
    ) -> None:
        first_row = 0
        for item in (schedule.scheduled[i] for i in sampling):
            next_row = first_row + len(item.draft) + 1
            if fault_of(item.sequence) == "nan":
                logits[first_row:next_row] = float("nan")
            first_row = next_row
        super()._sample(schedule, sampling, logits, masks, results)


if __name__ == "__main__":
    startup.LaunchingModelRunner = FaultyRunner  # type: ignore[misc]
    sys.exit(main())
