"""The engine as the front knows it: a worker process that may stall, die and come back.

Keeps of every request in flight what its samples have so far, so that a request whose
worker died goes on in the next worker from there. Equal noise for equal positions makes
the continuation the one that the dead worker would have given. What a dead worker was
computing goes on one request after the other, so that one that kills workers ends alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from salver.server.engine.changes import Change, Changed
from salver.server.engine.channel import ChannelClosed
from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import (
    EngineError,
    EngineStartError,
    EngineUnavailable,
    RequestAborted,
    RequestFailed,
)
from salver.server.engine.pending_changes import PendingChanges
from salver.server.engine.request import (
    Abort,
    EngineRequest,
    Ready,
    SequenceOutput,
    Shutdown,
    StepMessage,
    Submit,
)
from salver.server.engine.status_page import StatusPage
from salver.server.engine.worker_process import WORKER_COMMAND, WorkerProcess

_log = logging.getLogger(__name__)

MAX_DEATHS = 2  # of workers, that end a request which may be blamed: alone, or as the suspect
MAX_WITNESSED = 4  # deaths that end it in any case: what kills now and then is among those that see it


class EngineState(enum.Enum):
    """What the engine can do now. Requests are taken while SERVING and STALLED."""

    STARTING = "starting"
    SERVING = "serving"
    STALLED = "stalled"  # alive, but without progress
    RESTARTING = "restarting"  # the worker died; the next one is loading
    FAILED = "failed"  # it died too often in a row, or never started
    STOPPED = "stopped"


class OutputSink(Protocol):
    """Where the engine puts what becomes of a request; never called after its end or abort."""

    def put(self, output: SequenceOutput) -> None: ...

    def started(self, seconds: float) -> None: ...

    def fail(self, error: EngineError) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """Patience, in seconds."""

    tick: float = 0.25  # between looks at the worker's progress
    stalled_after: float = 1.5  # without progress
    kill_after: float = 60.0  # stalled for so long: killed and started anew
    start_timeout: float = 900.0  # for a worker to load its model
    stop_grace: float = 2.0  # for a worker to end when asked
    backoff: float = 0.25  # before the second restart in a row; doubles
    max_backoff: float = 30.0
    proven_after: float = 60.0  # a worker that lived for so long has served, even if nobody asked


class _InFlight:
    """A request in the engine, and what has come out so far."""

    __slots__ = ("deaths", "prompt_logprobs", "request", "sink", "started", "tokens")

    def __init__(self, request: EngineRequest, sink: OutputSink) -> None:
        self.request = request
        self.sink = sink
        self.tokens = {  # of the unfinished samples
            index: list(output) for index, output in zip(request.sample_indices, request.outputs, strict=True)
        }
        self.prompt_logprobs = 0  # positions told
        self.started = False
        self.deaths = 0

    def rest(self) -> EngineRequest:
        """What is still to be done, as a request."""
        request = self.request
        top_k, first = request.prompt_top_k, max(1, request.prompt_logprobs_start) + self.prompt_logprobs
        if first >= len(request.prompt_token_ids):
            top_k = None  # all told: the new worker may read its prefix cache
        return replace(
            request,
            sample_indices=tuple(self.tokens),
            outputs=tuple(map(tuple, self.tokens.values())),
            prompt_top_k=top_k,
            prompt_logprobs_start=first if self.prompt_logprobs else request.prompt_logprobs_start,
            submitted=time.monotonic(),
        )


class EngineProcess:
    """Owns the worker process. All methods are called on the loop that `start` ran on."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_step: Callable[[StepMessage], None] | None = None,
        on_state: Callable[[EngineState], None] | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        times: EngineTimes | None = None,
        max_failures: int = 5,
    ) -> None:
        """Starts nothing yet. `config` may be changed later: the next worker is started with it.

        `on_step` sees every step before its requests do, `on_state` every change of state.
        `command` is the worker's, without its descriptors (for tests). After `max_failures`
        workers in a row that did not come up, or died before they served, the engine is FAILED.
        """
        self.config = config
        self.ready: Ready | None = None
        self.state = EngineState.STARTING
        self.page = StatusPage.create()
        self.restarts = 0  # workers that came up in the place of a dead one
        self._on_step = on_step
        self._on_state = on_state
        self._command = tuple(command)
        self._times = times or EngineTimes()
        self._max_failures = max_failures
        self._worker: WorkerProcess | None = None
        self._loading: WorkerProcess | None = None  # started, not ready yet
        self._in_flight: dict[int, _InFlight] = {}
        self._changes = PendingChanges()
        self._lost_adapters: dict[str, str] = {}  # keys that this worker does not have, and why
        self._suspect: _InFlight | None = None  # it may be what killed the last worker
        self._unproven: set[int] = set()  # its samples that this worker has not survived yet
        self._held: deque[_InFlight] = deque()  # in flight, but behind the suspect
        self._served = False  # the current worker, at least one step
        self._start_seconds = 1.0  # what the last start took
        self._retry_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """Of the current worker; None while there is none."""
        return self._worker.pid if self._worker else None

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    async def start(self) -> Ready:
        """Starts the worker and waits until it is ready. Raises EngineStartError, leaving no process."""
        try:
            ready = await self._launch()
        except EngineStartError as error:
            if self.state is EngineState.STOPPED:
                raise EngineStartError("the engine was stopped while it started") from error
            self._set_state(EngineState.FAILED)
            raise
        self._set_state(EngineState.SERVING)
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch())]
        return ready

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        """Gives a request to the worker. Raises EngineUnavailable while there is none."""
        if self.state not in (EngineState.SERVING, EngineState.STALLED) or self._worker is None:
            raise self._unavailable()
        if (reason := self._lost_adapters.get(request.adapter)) is not None:
            raise RequestAborted(f"the adapter is lost: {reason}", "ADAPTER_LOST")
        entry = _InFlight(request, sink)
        if self._suspect is not None:
            self._held.append(entry)
        else:
            try:
                self._worker.send(Submit(request))
            except ChannelClosed as error:  # it died, and the supervisor has not woken up yet
                raise self._unavailable() from error
        self._in_flight[request.request_id] = entry

    async def change(self, change: Change) -> Changed:
        """What the worker made of it. Raises ChangeRefused, and EngineUnavailable: the worker is not there,
        or died; nothing is changed then, for the next one starts with `config`."""
        self.tell(change)
        return await self._changes.answer(change.ticket)

    def tell(self, change: Change) -> None:
        """As `change`, for one whose outcome nobody waits for. Raises EngineUnavailable."""
        if self.state not in (EngineState.SERVING, EngineState.STALLED) or self._worker is None:
            raise self._unavailable()
        try:
            self._worker.send(change)
        except ChannelClosed as error:
            raise self._unavailable() from error

    def requests_of_adapters(self) -> list[tuple[str, bool]]:
        """Of every request in the engine, the adapter's key ("" for none), and whether it has begun."""
        return [(entry.request.adapter, entry.started) for entry in list(self._in_flight.values())]

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        """Ends a request or one sample: its sink hears nothing more of it. Unknown ones are ignored."""
        entry = self._in_flight.get(request_id)
        if entry is None:
            return
        if sample_index is None:
            entry.tokens.clear()
        elif entry.tokens.pop(sample_index, None) is None:
            return
        if not entry.tokens:
            del self._in_flight[request_id]
        if self._worker is not None:
            # To a dead worker there is nothing to say: what was aborted is not submitted again.
            with contextlib.suppress(ChannelClosed):
                self._worker.send(Abort(request_id, sample_index))
        if entry is self._suspect:
            self._unproven &= entry.tokens.keys()
            self._release_if_proven()

    async def stop(self) -> None:
        """Ends the worker, asked first and killed then, and fails what is in flight. Idempotent."""
        if self.state is EngineState.STOPPED:
            return
        self._set_state(EngineState.STOPPED)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_all(EngineUnavailable("the server is stopping"))
        if self._loading is not None:  # start() still waits for it
            self._loading.kill()
            await self._loading.reap()
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            with contextlib.suppress(ChannelClosed):
                worker.send(Shutdown())
            await worker.exited(self._times.stop_grace)
        finally:
            worker.kill()
        await worker.reap()

    # --- the worker's messages ---------------------------------------------------------

    def _receive(self, message: object) -> None:
        if isinstance(message, Changed):
            self._changes.settle(message)
            return
        if not isinstance(message, StepMessage):
            raise TypeError(f"a worker does not send {type(message).__name__}")
        # That a step begins is not that it ends.
        self._served = self._served or bool(message.outputs) or message.stats is not None
        if self._on_step is not None:
            try:
                self._on_step(message)
            except Exception:  # who counts steps must not cost anyone an answer
                _log.exception("a step could not be counted")
        in_flight = self._in_flight
        for request_id, seconds in message.started:
            entry = in_flight.get(request_id)
            if entry is not None and not entry.started:
                entry.started = True
                entry.sink.started(seconds)
        for output in message.outputs:
            entry = in_flight.get(output.request_id)
            if entry is None:
                continue  # aborted; it was on its way
            tokens = entry.tokens.get(output.sample_index)
            if tokens is None:
                continue
            tokens += output.token_ids
            if output.prompt_logprobs:
                entry.prompt_logprobs += len(output.prompt_logprobs)
            if output.finish_reason is not None:
                del entry.tokens[output.sample_index]
                if not entry.tokens:
                    del in_flight[output.request_id]
            try:
                entry.sink.put(output)
            except Exception:  # a bug in one request's reader must not reach the others
                _log.exception("request %d: its output could not be taken", output.request_id)
                self.abort(output.request_id)
                entry.sink.fail(RequestFailed("an output could not be taken"))
            goes_well = output.token_ids or output.computing or output.finish_reason is not None
            if entry is self._suspect and goes_well:
                self._unproven.discard(output.sample_index)
                self._release_if_proven()

    # --- life and death ----------------------------------------------------------------

    async def _launch(self) -> Ready:
        begin = time.monotonic()
        worker = await WorkerProcess.spawn(self._command, self.page.fd, self._receive)
        self._loading = worker
        try:
            # Closed already: it died at once, and ready() tells how.
            with contextlib.suppress(ChannelClosed):
                worker.send(self.config)
            ready = await worker.ready(self._times.start_timeout)
            if self.state is EngineState.STOPPED:
                raise EngineStartError("stopped")
        except BaseException:
            worker.kill()
            await worker.reap()
            raise
        finally:
            self._loading = None
        self._start_seconds = time.monotonic() - begin
        self._worker, self.ready, self._served = worker, ready, False
        self._lost_adapters = dict(ready.lost_adapters)
        return ready

    async def _supervise(self) -> None:
        try:
            await self._keep_alive()
        except Exception:
            _log.exception("the worker's supervision failed")
            self._set_state(EngineState.FAILED)
        self._fail_all(EngineUnavailable("the worker does not come up again", 30.0))

    async def _keep_alive(self) -> None:
        """Restarts the worker whenever it dies; returns when it gives up, in state FAILED."""
        failures = 0
        while True:
            worker = self._worker
            assert worker is not None
            born = time.monotonic()
            await worker.dead.wait()
            self._retry_at = time.monotonic() + self._start_seconds
            self._set_state(EngineState.RESTARTING)
            await worker.reap()  # everything it sent has been received after this
            self._worker = None
            self._changes.fail_all(self._unavailable())
            self.page.retire_worker()
            _log.error("the worker (pid %d) %s", worker.pid, worker.describe_exit())
            self._bury()
            if self._served or time.monotonic() - born >= self._times.proven_after:
                failures = 0
            else:
                failures += 1
            while self._worker is None:
                if failures >= self._max_failures:
                    _log.error("%d workers in a row did not serve: giving up", failures)
                    self._set_state(EngineState.FAILED)
                    return
                if failures:
                    delay = min(self._times.max_backoff, self._times.backoff * 2 ** (failures - 1))
                    self._retry_at = time.monotonic() + delay + self._start_seconds
                    await asyncio.sleep(delay)
                try:
                    await self._launch()
                except EngineStartError as error:
                    failures += 1
                    _log.error("the worker could not be started again: %s", error)
            self.restarts += 1
            self._resubmit()
            self._set_state(EngineState.SERVING)

    def _bury(self) -> None:
        """Counts a death for whatever may have been its cause, and fails what is to blame.

        What waited is not the cause. Nor is what ran beside a suspect: it had been a suspect itself.
        """
        blamed = [entry for entry in self._in_flight.values() if entry.started]
        if self._suspect is not None:
            blamed = [self._suspect]
        self._suspect = None
        limit = MAX_DEATHS if len(blamed) == 1 else MAX_WITNESSED
        for entry in blamed:
            entry.deaths += 1
            if entry.deaths >= limit:
                del self._in_flight[entry.request.request_id]
                deaths = f"the worker died {entry.deaths} times while it computed this request"
                entry.sink.fail(RequestFailed(deaths))

    def _resubmit(self) -> None:
        """Gives a new worker what is in flight; first, one by one, what a dead one was computing."""
        for request_id, entry in list(self._in_flight.items()):
            if (reason := self._lost_adapters.get(entry.request.adapter)) is not None:
                del self._in_flight[request_id]
                entry.sink.fail(RequestAborted(f"the adapter is lost: {reason}", "ADAPTER_LOST"))
        self._held = deque(sorted(self._in_flight.values(), key=lambda entry: not entry.deaths))
        self._release()

    def _release_if_proven(self) -> None:
        """The suspect gave a token more in each sample (or ended): computing it does not kill."""
        if not self._unproven:
            self._suspect = None
            self._release()

    def _release(self) -> None:
        """Gives the worker what is held, up to the next suspect."""
        assert self._worker is not None
        while self._held and self._suspect is None:
            entry = self._held.popleft()
            if self._in_flight.get(entry.request.request_id) is not entry:
                continue  # aborted
            try:
                self._worker.send(Submit(entry.rest()))
            except ChannelClosed:
                return  # dead again: the supervisor finds that next, and all are submitted anew
            if entry.deaths:
                self._suspect, self._unproven = entry, set(entry.tokens)

    async def _watch(self) -> None:
        """Compares the worker's progress with what it was; standing still is a stall."""
        times = self._times
        seen, still, last = self.page.progress, 0.0, time.monotonic()
        while True:
            await asyncio.sleep(times.tick)
            now = time.monotonic()
            progress = self.page.progress
            if progress != seen or self.state not in (EngineState.SERVING, EngineState.STALLED):
                seen, still = progress, 0.0
                if self.state is EngineState.STALLED:
                    _log.warning("the worker goes on")
                    self._set_state(EngineState.SERVING)
            else:
                # Where the front itself stood still (a frozen container) the worker is not to blame.
                still += min(now - last, 4 * times.tick)
            last = now
            if still >= times.stalled_after and self.state is EngineState.SERVING:
                _log.warning("the worker has made no progress for %.1f seconds", still)
                self._set_state(EngineState.STALLED)
            if still >= times.stalled_after + times.kill_after and self._worker is not None:
                _log.error("the worker has stalled for %.0f seconds and is killed", still)
                still = 0.0
                self._worker.kill()

    # --- inside ------------------------------------------------------------------------

    def _set_state(self, state: EngineState) -> None:
        if state is self.state:
            return
        self.state = state
        if self._on_state is not None:
            self._on_state(state)

    def _fail_all(self, error: EngineError) -> None:
        self._changes.fail_all(error)
        entries, self._in_flight = list(self._in_flight.values()), {}
        for entry in entries:
            entry.sink.fail(error)

    def _unavailable(self) -> EngineUnavailable:
        if self.state in (EngineState.FAILED, EngineState.STOPPED):
            return EngineUnavailable(f"the engine has {self.state.value}", 30.0)
        retry_after = max(0.1, self._retry_at - time.monotonic())
        return EngineUnavailable("the worker is starting", retry_after)
