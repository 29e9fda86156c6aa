"""Every method, as the server's reflection lists them, with random messages and random bytes.

SALVER_FUZZ_EXAMPLES=1000 makes it longer, and random: then each run tries others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support import fuzzing
from support.serving import Server

EXAMPLES = os.environ.get("SALVER_FUZZ_EXAMPLES")
# A request may well ask for more than it has time for. A method that hangs shows by what it leaves behind.
TIMEOUT = 0.5  # seconds
WATCH = "/grpc.health.v1.Health/Watch"  # never ends
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}


@pytest.fixture(scope="module")
def server(start_module_server: Callable[..., Server], tiny_llama: Path) -> Server:
    return start_module_server(tiny_llama, "--max-message-size", "4MiB")


@pytest.fixture(scope="module")
def methods(server: Server) -> list[fuzzing.Method]:
    found = fuzzing.methods(server.channel)
    paths = {method.path for method in found}
    assert {"/salver.v1.GenerationService/StreamChat", WATCH} <= paths
    assert {path.split("/")[1] for path in paths} >= {"grpc.reflection.v1.ServerReflection"}
    return found


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    worker = server.worker.pid
    yield
    server.wait_idle()
    assert server.worker.pid == worker
    assert len(server.tokens("still here", max_tokens=3, ignore_eos=True)) == 3
    assert "Traceback" not in server.log, server.log


def fuzz(
    server: Server, method: fuzzing.Method, payloads: st.SearchStrategy[list[bytes]], examples: int
) -> set[grpc.StatusCode]:
    """The statuses that came. AssertionError for one that says that something went wrong inside."""
    reached = set()

    @settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=payloads)
    def answered(content: list[bytes]) -> None:
        code = method.call(server.channel, content, 0.05 if method.path == WATCH else TIMEOUT)
        note(f"{method.path} {content!r:.2000} -> {code}")
        assert code not in BUGS, (method.path, code)
        reached.add(code)

    answered()
    server.wait_idle(5)
    return reached


def test_random_messages(server: Server, methods: list[fuzzing.Method]) -> None:
    generate, tokenize = "/salver.v1.GenerationService/Generate", "/salver.v1.TokenizationService/Tokenize"
    reached = {
        method.path: fuzz(server, method, fuzzing.payloads(method), 60 if method.path == generate else 20)
        for method in methods
    }
    # Some were good, or nothing was tried of what comes after the checks.
    for path in (generate, tokenize):
        assert reached[path] >= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


def test_random_bytes(server: Server, methods: list[fuzzing.Method]) -> None:
    for method in methods:
        fuzz(server, method, fuzzing.broken_payloads(method), 12)
