"""Too much work on a real server: who cannot be answered in time is told so at once, with push-back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from support import calls
from support.serving import Server, wait_until

from salver.v1 import common_pb2

LONG = {"max_tokens": 400, "ignore_eos": True}
LATE = {**LONG, "priority": -9}  # behind all others


@pytest.fixture(scope="module")
def small(start_module_server: Callable[..., Server], tiny_llama: Path) -> Server:
    return start_module_server(tiny_llama, "--max-num-seqs", "1", "--speculation", "off")


@pytest.fixture
def crowd(small: Server) -> Iterator[list[object]]:
    """40 streams of 400 tokens, one at a time: no machine does half of that within a second."""
    small.generate("how fast is it?", max_tokens=100, ignore_eos=True)
    streams = [
        small.generation.StreamGenerate(calls.stream_request(f"number {i}", **LONG)) for i in range(40)
    ]
    wait_until("a queue", lambda: small.occupancy()[1] >= 30)  # the first may be done by now
    yield streams
    for stream in streams:
        stream.cancel()
    small.wait_idle()


def test_what_would_be_late_is_refused_at_once(small: Server, crowd: list[object]) -> None:
    request = calls.generate_request("in a hurry", **LATE)
    failure = calls.failure_of(lambda: small.generation.Generate(request, timeout=1.0))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED, failure
    assert failure.reason == "DEADLINE_TOO_SHORT"
    assert failure.retry_after is not None and failure.retry_after >= 0.5
    assert failure.pushback_ms == str(round(failure.retry_after * 1000))
    stream = calls.stream_request("in a hurry", **LATE)
    failure = calls.failure_of(lambda: list(small.generation.StreamGenerate(stream, timeout=1.0)))
    assert failure.reason == "DEADLINE_TOO_SHORT"
    assert small.metric("salver_rejections_total", reason="deadline") == 2
    no_hurry = calls.stream_request("no hurry", max_tokens=1, priority=-9)
    patient = small.generation.StreamGenerate(no_hurry, timeout=3600)
    for running in crowd:
        running.cancel()  # type: ignore[attr-defined]
    assert list(patient)[-1].completions[0].finish_reason == common_pb2.FINISH_REASON_LENGTH


def test_an_idle_server_takes_any_deadline(small: Server) -> None:
    before = small.metric("salver_rejections_total", reason="deadline")
    stream = small.generation.StreamGenerate(
        calls.stream_request("as far as it comes", max_tokens=400, ignore_eos=True), timeout=0.2
    )
    try:
        list(stream)
    except grpc.RpcError as error:
        assert calls.read_failure(error).code is grpc.StatusCode.DEADLINE_EXCEEDED
    small.wait_idle()
    assert small.metric("salver_rejections_total", reason="deadline") == before
