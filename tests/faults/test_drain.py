"""SIGTERM: streams end in peace, newcomers are sent elsewhere, and the exit status is 0."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from faults.test_worker import Watch
from grpc_health.v1 import health_pb2
from support import calls
from support.serving import SALVER, Server, wait_until

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


def test_a_drain_under_load_has_an_end(start_server: Callable[..., Server], long_llama: Path) -> None:
    """What can end in the drain period does; what runs on or still waits is told to go on elsewhere."""
    # Long answers are to wait here: none is refused because it would end after its deadline.
    flags = ("--drain-period", "3s", "--max-num-seqs", "8", "--no-deadline-admission")
    served = start_server(long_llama, *flags)
    short = [{"prompt": f"short {i}", "max_tokens": 200, "temperature": 1.0, "seed": i + 1} for i in range(4)]
    requests = [calls.generate_request(ignore_eos=True, **fields) for fields in short]
    expected = [calls.tokens_of(reply) for reply in served.together(requests)]
    watch = Watch(served)
    endless = [served.stream(f"endless {i}", max_tokens=8000, ignore_eos=True) for i in range(4)]
    begun = [next(stream) for stream in endless]
    ending = [served.stream(ignore_eos=True, **fields) for fields in short]
    firsts = [next(stream) for stream in ending]
    waiting = [served.stream(f"waiting {i}", max_tokens=8000, ignore_eos=True, n=8) for i in range(3)]
    unary = served.generation.Generate.future(
        calls.generate_request("unary", max_tokens=8000, ignore_eos=True, n=8), timeout=calls.TIMEOUT
    )
    wait_until("a queue", lambda: served.occupancy()[1] >= 4)
    served.process.terminate()
    assert watch.next(1) == NOT_SERVING
    for stream, first, (tokens,) in zip(ending, firsts, expected, strict=True):
        assert calls.Collected([first, *stream]).tokens == {0: tokens}
    failures = [calls.failure_of(lambda stream=stream: list(stream)) for stream in (*endless, *waiting)]
    failures.append(calls.failure_of(unary.result))
    for failure in failures:
        assert failure.code is grpc.StatusCode.UNAVAILABLE, failure
        assert failure.retry_after is not None and failure.pushback_ms is not None
    assert all(message.completions for message in begun)
    assert served.process.wait(30) == 0, served.log


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(
    start_server: Callable[..., Server], long_llama: Path, second: signal.Signals
) -> None:
    served = start_server(long_llama, "--drain-period", "1h")
    stream = served.stream("endless", max_tokens=8000, ignore_eos=True)
    next(stream)
    worker = served.worker
    served.process.terminate()
    served.wait_health(NOT_SERVING, 5)
    next(stream)  # it goes on
    served.process.send_signal(second)
    assert served.process.wait(10) == 128 + second, served.log
    assert calls.failure_of(lambda: list(stream)).code is grpc.StatusCode.UNAVAILABLE
    wait_until("the worker's end", lambda: not worker.is_running(), 10)


AS_PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def may_unshare() -> bool:
    """Whether this machine lets us make a process tree of our own: it wants root, or user namespaces."""
    tool = shutil.which(AS_PID_1[0])
    return tool is not None and subprocess.run([*AS_PID_1, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="no PID namespaces here")
def test_as_the_first_process_of_a_container(long_llama: Path, cache_dir: Path) -> None:
    """PID 1 has no default for a signal, and inherits what others leave: it drains and ends all the same."""
    flags = ("--dtype", "float32", "--threads", "1", "--cache-dir", str(cache_dir))
    served = Server(str(long_llama), *flags, command=(*AS_PID_1, SALVER, "serve")).wait_serving()
    try:
        (front,) = psutil.Process(served.process.pid).children()
        ids = re.search(r"NSpid:(.*)", Path(f"/proc/{front.pid}/status").read_text())
        assert ids is not None and ids[1].split()[-1] == "1"
        expected = served.tokens("to the end", max_tokens=1000, ignore_eos=True)
        stream = served.stream("to the end", max_tokens=1000, ignore_eos=True)
        collected = calls.Collected([next(stream)])
        killed = served.worker
        killed.kill()
        collected.add(next(stream))
        assert served.worker.pid != killed.pid
        assert [child.status() for child in front.children()].count(psutil.STATUS_ZOMBIE) == 0
        front.terminate()
        served.wait_health(NOT_SERVING, 1)
        for message in stream:
            collected.add(message)
        assert collected.tokens == {0: expected}
        assert served.process.wait(30) == 0, served.log
        assert "Traceback" not in served.log
    finally:
        served.kill()


BEFORE_IT_SERVES = """
import os, signal, time
from salver.server.cli import command
assert command(["--help"]) == 0
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
"""


@pytest.mark.skipif(not may_unshare(), reason="no PID namespaces here")
def test_a_signal_before_anything_is_open_ends_the_first_process_of_a_container() -> None:
    done = subprocess.run([*AS_PID_1, sys.executable, "-c", BEFORE_IT_SERVES], capture_output=True)
    assert done.returncode == 128 + signal.SIGTERM, done


@pytest.mark.skipif(not may_unshare(), reason="no PID namespaces here")
def test_a_signal_while_loading_ends_the_first_process_of_a_container(
    long_llama: Path, cache_dir: Path
) -> None:
    server = Server(str(long_llama), "--cache-dir", str(cache_dir), command=(*AS_PID_1, SALVER, "serve"))
    try:
        (front,) = psutil.Process(server.process.pid).children()
        front.terminate()
        assert server.process.wait(30) in (0, 128 + signal.SIGTERM), server.log
        assert "Traceback" not in server.log
    finally:
        server.kill()


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
