"""SIGTERM: streams end in peace, newcomers are sent elsewhere, and the exit status is 0."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support import calls
from support.serving import Server

from salver.v1 import common_pb2

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_lets_streams_finish(
    start_server: Callable[..., Server], long_llama: Path, signum: signal.Signals
) -> None:
    served = start_server(long_llama)
    expected = served.tokens("to the end", max_tokens=2000, ignore_eos=True)
    stream = served.stream("to the end", max_tokens=2000, ignore_eos=True)
    collected = calls.Collected([next(stream)])
    served.process.send_signal(signum)
    served.wait_health(NOT_SERVING, 1)
    assert served.health_of("readiness") == NOT_SERVING
    assert served.health_of("liveness") == SERVING
    failure = calls.failure_of(lambda: served.generate("too late", max_tokens=2))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.retry_after is not None and failure.pushback_ms is not None
    for message in stream:
        collected.add(message)
    assert collected.tokens == {0: expected}
    assert collected.finish_reasons == {0: common_pb2.FINISH_REASON_LENGTH}
    assert served.process.wait(30) == 0, served.log


def test_a_drain_has_an_end(start_server: Callable[..., Server], long_llama: Path) -> None:
    served = start_server(long_llama, "--drain-period", "500ms")
    stream = served.stream("for ever", max_tokens=8000, ignore_eos=True)
    next(stream)
    start = time.monotonic()
    served.process.terminate()
    assert served.process.wait(10) == 0, served.log
    assert time.monotonic() - start < 5
    try:
        collected = calls.Collected(stream)
        assert collected.finish_reasons == {0: common_pb2.FINISH_REASON_ABORT}
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_an_idle_server_ends_at_once(start_server: Callable[..., Server], long_llama: Path) -> None:
    served = start_server(long_llama)
    start = time.monotonic()
    assert served.stop() == 0, served.log
    assert time.monotonic() - start < 5


def test_a_signal_while_loading_ends_the_start(long_llama: Path, cache_dir: Path) -> None:
    server = Server(str(long_llama), "--dtype", "float32", "--cache-dir", str(cache_dir))
    try:
        # The port is open; the model is still being loaded.
        assert server.stop() in (0, 128 + signal.SIGTERM), server.log
        assert "Traceback" not in server.log
    finally:
        server.kill()
