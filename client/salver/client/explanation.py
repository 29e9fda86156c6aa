"""Where a request's time went, and what it costs: of calls with `explain=True`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from salver.v1 import explanation_pb2


class LatencyCause(enum.StrEnum):
    """What a request waited for, or was computed by, in the order in which it meets them."""

    FRONT = "front"  # checks, admission, tokenization, the compilation of its grammar
    STEP_IN_PROGRESS = "step_in_progress"  # the step that ran when it came
    NO_SEAT = "no_seat"  # queue: as many sequences ran as may
    NO_BLOCKS = "no_blocks"  # queue: the cache had no room
    NO_TOKENS = "no_tokens"  # queue: the steps were full
    OTHER_TENANT = "other_tenant"  # queue: another tenant was next, though its request came later
    PREFILL = "prefill"  # its own tokens, up to the first one of the answer
    DECODE = "decode"  # its own tokens, after that
    INTERFERENCE = "interference"  # its steps took longer than they would have for it alone
    BETWEEN_STEPS = "between_steps"  # the engine's loop
    RECOMPUTATION = "recomputation"  # preempted: waiting again, and computing again what it had
    WORKER_RESTART = "worker_restart"  # the worker died: until a new one had the request
    DELIVERY = "delivery"  # from the end of its last step to the reply
    SLOW_READER = "slow_reader"  # the answer was complete, and the client still took what came before


_CAUSES = {explanation_pb2.LatencyCause.Value(f"LATENCY_CAUSE_{cause.name}"): cause for cause in LatencyCause}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Seconds by cause, which sum to `timings.total`; causes that took no time are left out.

    Of several samples the causes are those of the one that ended last. `device_seconds` is the bill:
    the share of the device's time that was this request's, all samples together.
    """

    causes: Mapping[LatencyCause, float]
    device_seconds: float


def from_explanation(explanation: explanation_pb2.Explanation) -> Explanation:
    """Causes that a newer server knows, and this client does not, are left out."""
    causes = {
        _CAUSES[part.cause]: _seconds(part.duration) for part in explanation.parts if part.cause in _CAUSES
    }
    return Explanation(causes, _seconds(explanation.device_time))


def _seconds(duration: Any) -> float:
    return float(duration.ToNanoseconds() / 1e9)
