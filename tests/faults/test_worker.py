"""The worker dies or stalls; the front notices, restarts it, and streams go on as if nothing had been."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support import calls
from support.serving import Server, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LENGTH = 1500
STREAMS: list[dict[str, Any]] = [
    {"prompt": "greedy", "max_tokens": LENGTH},
    {"prompt": "sampled", "max_tokens": LENGTH, "temperature": 1.0, "seed": 5},
    {"prompt": "two samples", "max_tokens": LENGTH, "temperature": 0.9, "top_p": 0.9, "n": 2, "seed": 6},
    {"prompt": "penalties", "max_tokens": LENGTH, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
]


class Watch:
    """The statuses that a Watch has said, as they come."""

    def __init__(self, server: Server, service: str = "") -> None:
        self.statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._call = server.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=300)
        threading.Thread(target=self._read, daemon=True).start()
        assert self.next() == SERVING

    def _read(self) -> None:
        try:
            for message in self._call:
                self.statuses.put(message.status)
        except grpc.RpcError:
            pass

    def next(self, timeout: float = 60) -> int:
        return self.statuses.get(timeout=timeout)


@pytest.fixture
def served(start_server: Callable[..., Server], long_llama: Path) -> Server:
    return start_server(long_llama)


def undisturbed(server: Server) -> list[list[list[int]]]:
    requests = [calls.generate_request(ignore_eos=True, cache_salt="before", **s) for s in STREAMS]
    return [calls.tokens_of(reply) for reply in server.together(requests)]


def test_streams_survive_the_death_of_the_worker(served: Server) -> None:
    expected = undisturbed(served)
    watch, alive = Watch(served), Watch(served, "liveness")
    worker = served.worker
    streams = [served.stream(ignore_eos=True, **s) for s in STREAMS]
    collected = []
    for stream in streams:
        collected.append(calls.Collected([]))
        while not collected[-1].tokens:
            collected[-1].add(next(stream))
    worker.kill()
    assert watch.next(2) == NOT_SERVING
    assert watch.next() == SERVING
    for stream, so_far, tokens in zip(streams, collected, expected, strict=True):
        for message in stream:
            so_far.add(message)
        assert [so_far.tokens[i] for i in sorted(so_far.tokens)] == tokens
        # Nobody resumed these but the server itself.
        assert so_far.last.usage.resumed_tokens == 0
        assert so_far.last.usage.completion_tokens == sum(map(len, tokens))
    assert served.worker.pid != worker.pid
    assert served.server_info().worker_restarts == 1
    served.wait_idle()
    assert undisturbed(served) == expected
    assert alive.statuses.empty(), "a restart of the worker is no reason to kill the pod"


def test_a_request_that_kills_two_workers_ends(served: Server) -> None:
    stream = served.stream("unlucky", max_tokens=8000, ignore_eos=True)
    next(stream)
    first = served.worker
    first.kill()
    wait_until("a new worker", lambda: served.worker.pid != first.pid)
    served.wait_health(SERVING, 60)
    wait_until("the stream to go on", lambda: served.occupancy()[0] == 1)
    served.worker.kill()
    failure = calls.failure_of(lambda: list(stream))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "Traceback" not in failure.message
    served.wait_health(SERVING, 60)
    assert len(served.tokens("the next", max_tokens=5, ignore_eos=True)) == 5
    served.wait_idle()


def test_new_calls_during_a_restart(served: Server) -> None:
    """They wait, or are told when to come again; nothing else."""
    worker = served.worker
    worker.kill()
    served.wait_health(NOT_SERVING, 2)
    request = calls.generate_request("early", max_tokens=4, ignore_eos=True)
    try:
        reply = served.generation.Generate(request, timeout=60)
        assert len(calls.tokens_of(reply)[0]) == 4
    except grpc.RpcError as error:
        failure = calls.read_failure(error)
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.retry_after and failure.pushback_ms
    served.wait_health(SERVING, 60)
    assert len(served.tokens("late", max_tokens=4, ignore_eos=True)) == 4


@pytest.mark.parametrize("busy", [False, True])
def test_a_stalled_worker_is_seen_within_two_seconds(served: Server, busy: bool) -> None:
    streams = [served.stream("busy", max_tokens=8000, ignore_eos=True)] if busy else []
    for stream in streams:
        next(stream)
    watch = Watch(served)
    worker = served.worker
    worker.send_signal(signal.SIGSTOP)
    try:
        assert watch.next(2.0) == NOT_SERVING
        assert served.health_of("readiness") == NOT_SERVING
    finally:
        worker.send_signal(signal.SIGCONT)
    assert watch.next(5) == SERVING
    for stream in streams:
        next(stream)
        stream.cancel()
    served.wait_idle()


def test_a_deadline_holds_while_the_worker_is_stalled(served: Server) -> None:
    worker = served.worker
    worker.send_signal(signal.SIGSTOP)
    try:
        request = calls.generate_request("stuck", max_tokens=4)
        failure = calls.failure_of(lambda: served.generation.Generate(request, timeout=1))
        assert failure.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
    finally:
        worker.send_signal(signal.SIGCONT)
    served.wait_health(SERVING, 10)
    served.wait_idle()


def test_the_worker_ends_with_the_front(served: Server) -> None:
    worker = served.worker
    served.process.kill()
    served.process.wait(10)
    wait_until("the worker's end", lambda: not worker.is_running(), 10)
