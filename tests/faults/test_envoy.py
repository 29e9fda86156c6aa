"""Two servers behind a real Envoy: its health checks move the calls, its faults are what the client bears."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults.survival import Load, disturbed, plain, wait_until_busy
from support.envoy import Envoy, abort, delay
from support.serving import Server, wait_until

from salver.client import Client, ConnectionOptions, DeadlineExceeded, Unavailable

UNAVAILABLE = 14


@pytest.fixture(scope="module")
def servers(start_module_server: Callable[..., Server], long_llama: Path) -> list[Server]:
    return [start_module_server(long_llama, "--drain-period", "1s") for _ in range(2)]


@pytest.fixture(scope="module")
def envoy(
    find_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, servers: list[Server]
) -> Iterator[Envoy]:
    directory = tmp_path_factory.mktemp("envoy")
    with Envoy(find_tool("envoy"), directory, [server.address for server in servers]) as envoy:
        wait_until("two healthy servers", lambda: len(envoy.healthy()) == 2)
        yield envoy


def test_injected_faults(envoy: Envoy) -> None:
    """Aborts are tried again, what is then wrong is said; delays count against the deadline."""
    with Client(envoy.address) as client:
        expected = [client.generate(f"p {i}", max_tokens=8, seed=i + 1, temperature=1.0) for i in range(16)]
    options = ConnectionOptions(metadata=abort(UNAVAILABLE, 30))
    with Client(envoy.address, options=options) as client:
        for index, answer in enumerate(expected):
            fields = {"max_tokens": 8, "seed": index + 1, "temperature": 1.0}
            assert plain(client.generate(f"p {index}", **fields)) == plain(answer)
            with client.stream_generate(f"p {index}", **fields) as stream:
                for _ in stream:
                    pass
            assert plain(stream.result) == plain(answer)
    injected = envoy.stat("http.front.fault.aborts_injected")
    assert injected > 3

    options = ConnectionOptions(metadata=abort(UNAVAILABLE, 100), max_attempts=2, resume_attempts=1)
    with Client(envoy.address, options=options) as client, pytest.raises(Unavailable):
        client.generate("never", max_tokens=1)
    assert 2 <= envoy.stat("http.front.fault.aborts_injected") - injected <= 4  # it gave up

    with Client(envoy.address, options=ConnectionOptions(metadata=delay(400))) as client:
        start = time.monotonic()
        assert client.generate("late", max_tokens=1).completions[0].token_ids
        assert time.monotonic() - start >= 0.4
        with pytest.raises(DeadlineExceeded):
            client.generate("too late", max_tokens=1, timeout=0.2)


def test_a_drain_moves_the_calls_and_loses_none(
    envoy: Envoy, servers: list[Server], start_module_server: Callable[..., Server], long_llama: Path
) -> None:
    """Also when it comes back."""
    enough = threading.Event()

    def ask(client: Client, index: int) -> int:
        count = 0
        while not enough.is_set():
            assert (
                len(client.generate(f"call {index}", max_tokens=20, ignore_eos=True).completions[0].token_ids)
                == 20
            )
            count += 1
        return count

    # The SDK's own attempts only: gRPC's would hide what Envoy lets through.
    options = ConnectionOptions(max_attempts=1)
    with Client(envoy.address, options=options) as client, ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, client, index) for index in range(6)]
        try:
            for server in servers:
                wait_until_busy(server, 1)
            servers[0].process.send_signal(signal.SIGTERM)
            wait_until("Envoy to know it", lambda: envoy.healthy() == {servers[1].address})
            assert servers[0].process.wait(30) == 0, servers[0].log
            before = servers[1].metric("salver_request_success_total")
            wait_until("the rest", lambda: servers[1].metric("salver_request_success_total") > before + 20)
            port = servers[0].address.rpartition(":")[2]
            servers[0] = start_module_server(long_llama, "--drain-period", "1s", "--port", port)
            wait_until("Envoy to know it", lambda: len(envoy.healthy()) == 2)
            wait_until_busy(servers[0], 1)
        finally:
            enough.set()
        assert all(call.result() for call in asking)


def test_a_killed_server_costs_no_token(envoy: Envoy, servers: list[Server]) -> None:
    def disturb(load: Load) -> None:
        wait_until_busy(servers[0], 2)
        servers[0].kill()
        wait_until("Envoy to know it", lambda: envoy.healthy() == {servers[1].address})

    outcome = disturbed(Load([envoy.address], 12, seed=3), disturb)
    assert not outcome.wrong, outcome.wrong[0]
    assert outcome.resumptions
