"""What the engine's front side raises; the rpc layer maps each to one status code."""

from __future__ import annotations

from salver.server.engine.changes import Refusal


class EngineError(Exception):
    """Base of all of them. The message is for a person."""


class EngineStartError(EngineError):
    """The worker did not come up: bad configuration or checkpoint, or it died. Says why."""


class EngineUnavailable(EngineError):
    """The engine takes no requests now (starting, restarting or stopped): UNAVAILABLE.

    `retry_after` is in seconds: when to try again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(EngineError):
    """This request's computation failed: its worker died twice, NaN in its logits: INTERNAL."""


class RequestDeadlineExceeded(EngineError):
    """The request's deadline passed, queued or running: DEADLINE_EXCEEDED."""


class RequestOutOfMemory(EngineError):
    """The request's own part of a step does not fit in memory: RESOURCE_EXHAUSTED."""


class RequestAborted(EngineError):
    """Who runs the server ended the request, as by unloading its adapter: ABORTED.

    `reason` is for programs.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChangeRefused(EngineError):
    """A change of what is served was not made, and nothing of it was."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class OutOfMemory(Exception):
    """Inside the worker: a step, or a part of it, does not fit in memory. Its parts may."""


class StartError(Exception):
    """The engine cannot start, and why, for a person: names the flag, the file or the tensor."""
