"""What nobody should send: a clear error, a server that lives on, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import calls
from support.checkpoints import VOCAB_SIZE
from support.serving import Server

from salver.v1 import common_pb2, generation_pb2, tokenization_pb2

Code = grpc.StatusCode
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def nothing_left_behind(tiny: Server) -> Iterator[None]:
    """Before and after: no block owned, nothing running or waiting, and the next request is answered."""
    tiny.wait_idle()
    pid = tiny.worker.pid
    yield
    tiny.wait_idle()
    assert len(tiny.tokens("still here", max_tokens=3, ignore_eos=True)) == 3
    assert tiny.worker.pid == pid


def refused(server: Server, request: Any) -> calls.Failure:
    method = {
        generation_pb2.GenerateRequest: server.generation.Generate,
        generation_pb2.ChatRequest: server.generation.Chat,
        generation_pb2.ScoreRequest: server.generation.Score,
    }[type(request)]
    return calls.failure_of(lambda: method(request, timeout=30))


def test_unknown_model(tiny: Server) -> None:
    failure = refused(tiny, calls.generate_request("a", model="gpt-17"))
    assert failure.code is Code.NOT_FOUND
    assert "gpt-17" in failure.message and tiny.name in failure.message


@pytest.mark.parametrize(
    "prompt", [common_pb2.Prompt(), common_pb2.Prompt(text=""), common_pb2.Prompt(token_ids={})], ids=repr
)
def test_empty_prompt(tiny: Server, prompt: Any) -> None:
    failure = refused(tiny, generation_pb2.GenerateRequest(prompt=prompt))
    assert failure.code is Code.INVALID_ARGUMENT
    assert [field.partition(".")[0] for field in failure.fields] == ["prompt"]


def test_no_messages(tiny: Server) -> None:
    failure = refused(tiny, generation_pb2.ChatRequest())
    assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, ["messages"])


def test_prompt_longer_than_the_context(tiny: Server) -> None:
    failure = refused(tiny, calls.generate_request([5] * 600))
    assert failure.code is Code.OUT_OF_RANGE
    assert "600" in failure.message and "512" in failure.message


def test_prompt_and_max_tokens_beyond_the_context(tiny: Server) -> None:
    failure = refused(tiny, calls.generate_request([5] * 100, max_tokens=413))
    assert failure.code is Code.OUT_OF_RANGE
    assert all(number in failure.message for number in ("100", "413", "512"))
    assert len(tiny.tokens([5] * 100, max_tokens=412, ignore_eos=True)) == 412


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, NAN, INF)],
        *[("top_p", value) for value in (0.0, -1.0, 1.5, NAN)],
        *[("min_p", value) for value in (-0.1, 1.1, NAN)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, NAN, INF)],
        *[("presence_penalty", value) for value in (-3.0, 3.0, NAN)],
        *[("frequency_penalty", value) for value in (-3.0, 3.0, NAN)],
        *[("n", value) for value in (0, 10**6)],
        ("logit_bias", {5: NAN}),
        ("logit_bias", {5: 1000.0}),
        ("logit_bias", {10**6: 1.0}),
    ],
)
def test_sampling_out_of_bounds(tiny: Server, field: str, value: Any) -> None:
    failure = refused(tiny, calls.generate_request("a", **{field: value}))
    assert failure.code is Code.INVALID_ARGUMENT
    assert len(failure.fields) == 1
    assert failure.fields[0].startswith(f"sampling.{field}")
    assert f"sampling.{field}" in failure.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "stopping.min_tokens"),
        ({"stop": [""]}, "stopping.stop[0]"),
        ({"stop_token_ids": [10**6]}, "stopping.stop_token_ids[0]"),
        ({"output_top_k": 10**6}, "logprobs.output_top_k"),
        ({"prompt_top_k": 10**6}, "logprobs.prompt_top_k"),
        ({"priority": 11}, "priority"),
        ({"priority": -(2**31)}, "priority"),
    ],
    ids=str,
)
def test_other_fields_out_of_bounds(tiny: Server, fields: dict[str, Any], path: str) -> None:
    failure = refused(tiny, calls.generate_request("a", **fields))
    assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, [path])


def test_all_that_is_wrong_is_said_at_once(tiny: Server) -> None:
    failure = refused(tiny, calls.generate_request("", temperature=-1, top_p=2, stop=["x", ""], priority=99))
    assert failure.code is Code.INVALID_ARGUMENT
    got = {field.removesuffix(".text") for field in failure.fields}
    assert got == {"prompt", "sampling.temperature", "sampling.top_p", "stopping.stop[1]", "priority"}


@pytest.mark.parametrize("role", [generation_pb2.ROLE_UNSPECIFIED, 99])
def test_unknown_role(tiny: Server, role: int) -> None:
    request = calls.chat_request((generation_pb2.ROLE_USER, "hello"), (role, "hm"), max_tokens=2)
    failure = refused(tiny, request)
    assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, ["messages[1].role"])


def test_ids_outside_the_vocabulary(tiny: Server) -> None:
    for bad in (VOCAB_SIZE, 2**32 - 1):
        failure = refused(tiny, calls.generate_request([5, bad]))
        assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, ["prompt.token_ids.ids[1]"])
    request = tokenization_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=[10**6]))
    failure = calls.failure_of(lambda: tiny.tokenization.Detokenize(request, timeout=10))
    assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, ["token_ids.ids[0]"])


def test_ids_that_are_no_utf8(tiny: Server) -> None:
    """Half a character is a legal prompt of ids, and never comes out as half a character."""
    request = tokenization_pb2.TokenizeRequest(text="😀")
    whole = [token.id for token in tiny.tokenization.Tokenize(request, timeout=10).tokens]
    assert len(whole) == 4
    half = tokenization_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=whole[:2]))
    assert set(tiny.tokenization.Detokenize(half, timeout=10).text) == {"\N{REPLACEMENT CHARACTER}"}
    assert len(tiny.tokens(whole[:2], max_tokens=4, ignore_eos=True)) == 4


def test_a_string_that_is_no_utf8(tiny: Server) -> None:
    """Protobuf refuses it before we see it; it must not do more than that."""
    raw = tiny.channel.unary_unary("/salver.v1.GenerationService/Generate")
    failure = calls.failure_of(lambda: raw(b"\x0a\x02\xc3\x28", timeout=10))
    assert failure.code in (Code.INVALID_ARGUMENT, Code.INTERNAL)
    assert "Traceback" not in failure.message


def test_bytes_that_are_no_message(tiny: Server) -> None:
    raw = tiny.channel.unary_unary("/salver.v1.GenerationService/Generate")
    failure = calls.failure_of(lambda: raw(b"\xff" * 100, timeout=10))
    assert failure.code in (Code.INVALID_ARGUMENT, Code.INTERNAL)


def test_an_unknown_method(tiny: Server) -> None:
    raw = tiny.channel.unary_unary("/salver.v1.GenerationService/Levitate")
    assert calls.failure_of(lambda: raw(b"", timeout=10)).code is Code.UNIMPLEMENTED


def test_a_message_of_100_megabytes(tiny: Server) -> None:
    failure = refused(tiny, calls.generate_request("x" * 100_000_000))
    assert failure.code is Code.RESOURCE_EXHAUSTED


def test_a_long_text_within_the_message_limit(tiny: Server) -> None:
    """Too long for the context by far: refused, and the loop was never blocked meanwhile."""
    call = tiny.generation.Generate.future(calls.generate_request("ab " * 2_000_000), timeout=60)
    slowest = 0.0
    while not call.done():
        start = time.monotonic()
        tiny.health_of()
        slowest = max(slowest, time.monotonic() - start)
    assert call.code() is Code.OUT_OF_RANGE
    assert slowest < 1.0


def test_a_cancelled_stream(tiny: Server) -> None:
    stream = tiny.stream("never ending", max_tokens=480, ignore_eos=True, n=4)
    next(iter(stream))
    assert tiny.occupancy()[2] > 0
    stream.cancel()
    tiny.wait_idle(2)


def test_a_cancelled_unary_call(tiny: Server) -> None:
    before = tiny.metric("salver_generation_tokens_total")
    calls_ = [
        tiny.generation.Generate.future(
            calls.generate_request(f"no {i}", max_tokens=480, ignore_eos=True), timeout=60
        )
        for i in range(40)
    ]
    while tiny.metric("salver_generation_tokens_total") == before:
        assert not all(call.done() for call in calls_)
    for call in calls_:
        call.cancel()
    tiny.wait_idle(2)


GONE = """
import sys
sys.path[:0] = {path!r}
from support import calls
import grpc
from salver.v1 import generation_pb2_grpc
stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
requests = [calls.stream_request(f"p {{i}}", max_tokens=480, ignore_eos=True) for i in range(8)]
streams = [stub.StreamGenerate(request) for request in requests]
next(streams[0])
print("streaming", flush=True)
for stream in streams:
    list(stream)
"""


def test_a_client_that_dies_mid_stream(tiny: Server) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", GONE.format(path=[str(Path(__file__).parents[1])]), tiny.address],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "streaming\n"
    client.kill()
    client.wait()
    tiny.wait_idle(5)


@pytest.mark.parametrize("timeout", [0.001, 0.05, 0.2])
def test_a_deadline_too_short(tiny: Server, timeout: float) -> None:
    request = calls.generate_request("hurry", max_tokens=480, ignore_eos=True, n=8)
    failure = calls.failure_of(lambda: tiny.generation.Generate(request, timeout=timeout))
    assert failure.code is Code.DEADLINE_EXCEEDED
    tiny.wait_idle(2)


def test_a_deadline_in_a_stream(tiny: Server) -> None:
    request = calls.stream_request("hurry", max_tokens=480, ignore_eos=True, n=16)
    failure = calls.failure_of(lambda: list(tiny.generation.StreamGenerate(request, timeout=0.3)))
    assert failure.code is Code.DEADLINE_EXCEEDED
    tiny.wait_idle(2)


def test_a_request_that_the_cache_could_never_hold(
    start_server: Callable[..., Server], tiny_llama: Path
) -> None:
    # 512 bytes a token: 16 blocks of 16 tokens.
    small = start_server(tiny_llama, "--kv-cache-memory", str(256 * 512))
    capacity = small.server_info().limits.kv_cache_tokens
    assert 0 < capacity <= 256
    for fields in ({"prompt": [5] * 400, "max_tokens": 1}, {"prompt": [5] * 10, "max_tokens": 400}):
        failure = refused(small, calls.generate_request(**fields))
        assert failure.code is Code.OUT_OF_RANGE
        assert str(capacity) in failure.message
    assert len(small.tokens([5] * 100, max_tokens=100, ignore_eos=True)) == 100
    small.wait_idle()


def test_a_full_queue(start_server: Callable[..., Server], tiny_llama: Path) -> None:
    small = start_server(tiny_llama, "--max-num-seqs", "1", "--max-queued-requests", "2")
    request = calls.generate_request("wait", max_tokens=450, ignore_eos=True)
    futures = [small.generation.Generate.future(request, timeout=60) for _ in range(12)]
    codes = [future.code() for future in futures]
    full = [future for future in futures if future.code() is Code.RESOURCE_EXHAUSTED]
    assert set(codes) == {Code.OK, Code.RESOURCE_EXHAUSTED}
    assert codes.count(Code.OK) >= 3
    failure = calls.read_failure(full[0])
    assert failure.retry_after and failure.pushback_ms
    small.wait_idle()
    assert small.metric("salver_rejections_total") == len(full)


def test_chat_without_a_template(start_server: Callable[..., Server], tiny_gpt2: Path) -> None:
    failure = refused(
        start_server(tiny_gpt2), calls.chat_request((generation_pb2.ROLE_USER, "hello"), max_tokens=2)
    )
    assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "TASK_NOT_SUPPORTED")
