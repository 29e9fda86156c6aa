"""One worker process as the front sees it: started, greeted, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any

from salver.server.engine.async_channel import AsyncChannel
from salver.server.engine.channel import ChannelClosed
from salver.server.engine.errors import EngineStartError
from salver.server.engine.request import Failed, Ready

WORKER_COMMAND = (sys.executable, "-m", "salver.server.engine.worker")
_TAIL_LINES = 30
_DRAIN_SECONDS = 1.0  # for what a dead worker had sent, and for its last words


class WorkerProcess:
    """A started worker. `dead` is set when it has ended or closed its channel."""

    def __init__(self, process: subprocess.Popen[bytes], on_message: Callable[[object], None]) -> None:
        self._process = process
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._channel: AsyncChannel | None = None
        self._hello: asyncio.Future[Ready | Failed] = self._loop.create_future()
        self._exited = asyncio.Event()
        self._channel_closed = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.dead = asyncio.Event()

    @classmethod
    async def spawn(
        cls, command: Sequence[str], page_fd: int, on_message: Callable[[object], None]
    ) -> WorkerProcess:
        """Starts `command` with its channel and status page. Raises EngineStartError if it cannot run.

        In a session of its own, so that a terminal's Ctrl-C reaches the front alone.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds
                    [*command, "--socket-fd", str(theirs.fileno()), "--page-fd", str(page_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,  # our stdout is the command line's
                    pass_fds=(theirs.fileno(), page_fd),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise EngineStartError(f"cannot start the worker ({command[0]}): {error}") from error
        worker = cls(process, on_message)
        assert process.stdout is not None
        relay = threading.Thread(
            target=worker._relay, args=(process.stdout,), name="worker-stderr", daemon=True
        )
        relay.start()
        threading.Thread(target=worker._wait, args=(relay,), name="worker-exit", daemon=True).start()
        try:
            worker._channel = await AsyncChannel.open(ours, worker._receive, worker._on_channel_closed)
        except BaseException:
            worker.kill()
            ours.close()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        """Queues a message; never blocks. Raises ChannelClosed."""
        if self._channel is None:
            raise ChannelClosed("the worker's channel is closed")
        self._channel.send(message)

    async def ready(self, patience: float) -> Ready:
        """Waits so many seconds for the greeting. Raises EngineStartError: it failed, died or is late."""
        death = asyncio.ensure_future(self.dead.wait())
        either: set[asyncio.Future[Any]] = {self._hello, death}
        try:
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            death.cancel()
        if not self._hello.done():
            if not self.dead.is_set():
                raise EngineStartError(f"the worker was not ready after {patience:.0f} seconds")
            await self.reap()  # its greeting may have been on its way
        if not self._hello.done():
            raise EngineStartError(f"the worker {self.describe_exit()} before it was ready")
        hello = self._hello.result()
        if isinstance(hello, Failed):
            raise EngineStartError(hello.message)
        return hello

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process. Nothing if it has ended."""
        self._process.kill()

    async def reap(self) -> None:
        """Kills the worker if it still runs; returns when it is gone and all it sent was received."""
        if self._channel_closed.is_set():
            await self.exited(_DRAIN_SECONDS)  # it is ending by itself: let its exit code tell why
        self.kill()
        await self._exited.wait()
        if self._channel is not None:
            # A descendant that inherited the socket could keep it open: not for ever.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel_closed.wait(), _DRAIN_SECONDS)
            self._channel.close()

    async def exited(self, patience: float) -> bool:
        """Waits until the process has ended, or so many seconds; whether it has."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), patience)
        return self._exited.is_set()

    def describe_exit(self) -> str:
        """For people: "was killed by SIGKILL" or "ended with exit code 3", and its last words."""
        code = self._process.returncode
        if code is None:
            what = "closed its channel"
        elif code < 0:
            try:
                what = f"was killed by {signal.Signals(-code).name}"
            except ValueError:  # a real-time signal has no name
                what = f"was killed by signal {-code}"
        else:
            what = f"ended with exit code {code}"
        tail = "".join(self._tail).strip()
        return f"{what}; its last words:\n{tail}\n" if tail else what

    # --- inside ------------------------------------------------------------------------

    def _receive(self, message: object) -> None:
        if isinstance(message, Ready | Failed):
            if not self._hello.done():
                self._hello.set_result(message)
        else:
            self._on_message(message)

    def _on_channel_closed(self) -> None:
        self._channel_closed.set()
        self.dead.set()

    def _on_exit(self) -> None:
        self._exited.set()
        self.dead.set()

    def _wait(self, relay: threading.Thread) -> None:
        """In a thread: one sleeping thread is simpler than a child watcher, and works on any loop."""
        self._process.wait()
        relay.join(_DRAIN_SECONDS)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._on_exit)

    def _relay(self, pipe: IO[bytes]) -> None:
        """In a thread, because our own stderr may block: passes the worker's words through."""
        with pipe:
            for line in pipe:
                text = line.decode("utf-8", "replace")
                self._tail.append(text)
                # With our stderr gone the pipe must still be emptied, or the worker blocks.
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(text)
                    sys.stderr.flush()
