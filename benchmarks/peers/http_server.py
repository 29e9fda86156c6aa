"""A peer that is an HTTP server: its process, and a client that reads server-sent events.

The client is as thin as it can be, so that what is measured is the server: one connection a request,
plain asyncio streams. Standard library only, but for the end of the process tree.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarks.figures import BenchError, Trace
from benchmarks.peers.peer import Peer
from benchmarks.workload import BenchRequest

UNKNOWN_ID = -1
"""Stands for a token whose id the server kept to itself."""
TIMEOUT = 900.0
"""Of one run, seconds."""


async def body_of(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of an HTTP/1.1 answer's body. Raises BenchError when its status is not 200."""
    status = (await reader.readline()).split()
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    if len(status) < 2 or status[1] != b"200":
        text = (await reader.read(500)).decode(errors="replace")
        raise BenchError(f"HTTP status {b' '.join(status[1:]).decode()}: {text}")
    if headers.get("transfer-encoding") != "chunked":
        while piece := await reader.read(65536):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def events_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The `data:` lines as objects, to the end of the body or `[DONE]`."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                yield json.loads(text)


async def post(port: int, path: str, question: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events that answer a JSON question."""
    body = json.dumps(question).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(head.encode() + body)
        async for event in events_of(body_of(reader)):
            yield event
    finally:
        writer.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class HttpPeer(Peer):
    """A server that is ready when `/health` answers 200, and streams answers to token ids."""

    way = "HTTP"
    path: ClassVar[str]
    start_timeout: ClassVar[float] = 300.0
    _process: subprocess.Popen[bytes] | None = None
    _port = 0

    @abstractmethod
    def command(self, port: int) -> list[str | Path]:
        """What starts the server on a port of the loopback."""

    def environment(self) -> dict[str, str]:
        """Of the server: what its documentation advises."""
        return {}

    @abstractmethod
    def question(self, request: BenchRequest) -> dict[str, Any]:
        """The request as its API wants it: greedy, end-of-sequence ignored, streamed."""

    @abstractmethod
    def note(self, event: dict[str, Any], moment: float, trace: Trace) -> None:
        """Adds the tokens of one event, which came at `moment`."""

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.server.log"

    def start(self) -> None:
        self._port = free_port()
        started = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(self._port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment(),
            )
        while not self._healthy():
            if self._process.poll() is not None:
                raise BenchError(f"it ended with {self._process.returncode}: {self._tail()}")
            if time.perf_counter() - started > self.start_timeout:
                self.stop()
                raise BenchError(f"it did not start in {self.start_timeout:g} s: {self._tail()}")
            time.sleep(0.02)
        self.start_seconds = time.perf_counter() - started

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, reset, timed out, or 503 while it loads
            return False

    def _tail(self) -> str:
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-5:])

    async def _ask(self, request: BenchRequest, started: float) -> Trace:
        trace = Trace([], [])
        if request.at:
            await asyncio.sleep(started + request.at - time.perf_counter())
        async for event in post(self._port, self.path, self.question(request)):
            if "error" in event:
                raise BenchError(str(event["error"]))
            self.note(event, time.perf_counter() - started, trace)
        return trace

    async def _ask_all(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        started = time.perf_counter()
        async with asyncio.timeout(TIMEOUT):
            traces = await asyncio.gather(*(self._ask(request, started) for request in requests))
        return list(traces), time.perf_counter() - started

    def run(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        try:
            return asyncio.run(self._ask_all(requests))
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            alive = self._process is not None and self._process.poll() is None
            reason = f"{type(error).__name__}: {error}"
            raise BenchError(reason if alive else f"the server died ({reason}): {self._tail()}") from error

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        tree = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in psutil.wait_procs(tree, timeout=5)[1]:
            child.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid
