"""`salver deploy-check --watch`: streams go on while servers are restarted, and those lost are counted."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.serving import wait_until

from salver.client import Client, ConnectionOptions, fake_encoding
from salver.client.cli import main
from salver.client.cli.deploy_check import FAIL, OK, watch
from salver.client.testing import FakeServer
from salver.v1 import model_pb2

STREAMS = 4


def started(port: int = 0) -> FakeServer:
    server = FakeServer(port=port, delay=0.005)  # 64 tokens: a third of a second
    server.__enter__()
    return server


def watched(
    servers: list[FakeServer], options: ConnectionOptions, disturb: Callable[[], None]
) -> tuple[str, str]:
    """What `watch` finds of streams that run before, while and after `disturb` does what it does."""
    over = threading.Event()
    with Client([server.address for server in servers], options) as client, ThreadPoolExecutor(1) as pool:
        found: Future[tuple[str, str]] = pool.submit(watch, client, lambda: not over.is_set(), STREAMS)
        try:
            disturb()
        finally:
            over.set()
        return found.result(60)


def wait_for_streams(server: FakeServer) -> None:
    before = len(server.requests)
    wait_until("another stream", lambda: len(server.requests) > before)


def test_a_rolling_restart_loses_nothing() -> None:
    servers = [started(), started()]

    def restart_each() -> None:
        for server in servers[:2]:
            wait_for_streams(server)
            server.stop()  # as if killed, with streams under way
            servers.append(started(int(server.address.rpartition(":")[2])))
            wait_for_streams(servers[-1])

    try:
        status, detail = watched(servers[:2], ConnectionOptions(), restart_each)
    finally:
        for server in servers:
            server.stop()
    assert status == OK and " 0 lost" in detail, detail
    resumed = any(request.HasField("resume") for server in servers for request in server.requests)
    assert resumed == (" 0 of them resumed" not in detail), detail


def test_a_lost_stream_is_counted() -> None:
    """A client that does not resume, and a server that ends under its streams."""
    server = started()

    def stop_it() -> None:
        wait_for_streams(server)
        server.stop()

    try:
        status, detail = watched([server], ConnectionOptions(resume_attempts=0), stop_it)
    finally:
        server.stop()
    assert status == FAIL and " 0 lost" not in detail and "UNAVAILABLE" in detail, detail


def test_what_generates_nothing_is_asked_for_embeddings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = fake_encoding.model()
    encoder.tasks[:] = [model_pb2.TASK_EMBED, model_pb2.TASK_FILL_MASK]
    monkeypatch.setattr(fake_encoding, "model", lambda: encoder)
    with FakeServer() as server:
        main(["deploy-check", server.address, "--watch", "0.2", "--streams", "2", "--json"])
        asked = {type(request).__name__ for request in server.requests}
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["answer"]["status"] == OK and "embedding of fake" in found["answer"]["detail"]
    assert re.fullmatch("[1-9][0-9]* embeddings, 0 lost", found["rolling restart"]["detail"])
    assert asked == {"EmbedRequest"}


def test_the_command_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        main(["deploy-check", server.address, "--watch", "0.2", "--streams", "2"])
    assert " 0 lost" in capsys.readouterr().out
