"""What is known of a call while it is answered, for its trace and for the log."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from salver.server.engine.errors import EngineError


@dataclass(slots=True)
class RequestPhases:
    """When an engine request of the call passed from phase to phase; the monotonic clock, None: not yet."""

    arrival: float
    prompt_tokens: int
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    output_tokens: int = 0


@dataclass(slots=True, eq=False)
class Call:
    """One call of any method."""

    method: str
    begun: float = field(default_factory=time.monotonic)
    request_id: str = ""
    tenant: str = ""
    requests: list[RequestPhases] = field(default_factory=list)
    engine_requests: list[int] = field(default_factory=list)  # ids of all that it gave to the engine
    peer: str = ""
    adapter: str = ""  # the key of the one that it asks, which is kept for it until it ends
    doom: EngineError | None = None  # it shall end with this, also what of it has not begun
    audit: dict[str, Any] = field(default_factory=dict)  # of an admin call, what it asks for


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call | None:
    """The call that is being answered by this task."""
    return _current.get()


def enter_call(call: Call) -> None:
    """`current_call()` of this task from now on."""
    _current.set(call)
