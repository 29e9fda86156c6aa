"""The engine stepped in the caller's own loop and clock: deterministic tests, no process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from salver.server.engine.core import EngineCore, EngineLimits, Runner
from salver.server.engine.drafts import Speculation
from salver.server.engine.request import EngineRequest, SequenceOutput, StepMessage


class Sink(Protocol):
    """Where a request's outputs go (the same two calls as the front's streams take)."""

    def put(self, output: SequenceOutput) -> None: ...

    def started(self, seconds: float) -> None: ...


class InlineEngine:
    """Submits to an `EngineCore` and hands its outputs round after every `step()`."""

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        *,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
    ) -> None:
        self._hold(EngineCore(runner, limits, clock=clock, speculation=speculation))

    @classmethod
    def of(cls, core: EngineCore) -> InlineEngine:
        """Steps a core that is there already."""
        engine = cls.__new__(cls)
        engine._hold(core)
        return engine

    def _hold(self, core: EngineCore) -> None:
        self.core = core
        self._sinks: dict[int, Sink] = {}
        self._unfinished: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        self._sinks[request.request_id] = sink
        self._unfinished[request.request_id] = len(request.sample_indices)
        self.core.add(request)

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        """What `EngineProcess.abort` does: nothing more is heard of it."""
        aborted = len(self.core.scheduler.find(request_id, sample_index))
        if sample_index is None:
            aborted = self._unfinished.get(request_id, 0)
        self.core.abort(request_id, sample_index)
        self._ended(request_id, aborted)

    def step(self) -> StepMessage | None:
        message = self.core.step()
        if message is None:
            return None
        for request_id, seconds in message.started:
            if request_id in self._sinks:
                self._sinks[request_id].started(seconds)
        for output in message.outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue
            sink.put(output)
            if output.finish_reason is not None:
                self._ended(output.request_id, 1)
        return message

    def run(self, max_steps: int = 100_000) -> None:
        """Steps until nothing is left. Raises RuntimeError when that takes more than max_steps."""
        for _ in range(max_steps):
            if not self.has_work:
                return
            self.step()
        raise RuntimeError(f"still working after {max_steps} steps")

    def _ended(self, request_id: int, samples: int) -> None:
        if request_id not in self._unfinished:
            return
        self._unfinished[request_id] -= samples
        if self._unfinished[request_id] <= 0:
            del self._sinks[request_id], self._unfinished[request_id]
