"""HTTP/2 and gRPC framing as an attacker has them: the neighbours' calls go on, and nothing stays behind."""

from __future__ import annotations

import gzip
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    PingFrame,
    PriorityFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from support import calls
from support.serving import Server, wait_until
from support.wire import (
    ENHANCE_YOUR_CALM,
    GENERATE,
    REFUSED_STREAM,
    STREAM_GENERATE,
    Answer,
    Wire,
    grpc_message,
    wires,
)

from salver.v1 import generation_pb2

MB = 1_000_000
# Of the front, above what it needs to begin with, whatever was done to it before. All streams that the
# tests below open would be more if each left its 8 KB behind.
MEMORY = 120 * MB
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 4, 8, 12, 13


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


REQUEST = serialized(calls.generate_request("a", max_tokens=2, ignore_eos=True))
WHOLE = grpc_message(REQUEST)


@pytest.fixture(scope="module")
def server(start_module_server: Callable[..., Server], long_llama: Path) -> Server:
    server = start_module_server(long_llama)
    ordinary(server)
    return server


@pytest.fixture(scope="module")
def first(server: Server) -> tuple[int, int]:
    """The front's memory (bytes) and open files before anything was done to it."""
    front = psutil.Process(server.process.pid)
    return front.memory_info().rss, front.num_fds()


@pytest.fixture(scope="module", autouse=True)
def silent(server: Server, first: tuple[int, int]) -> Iterator[list[Wire]]:
    """Two connections that say nothing more: one not even the preface. Begun now, looked at in the end."""
    with wires(server.address, 2) as (mute, begun):
        begun.send_bytes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame().serialize())
        yield [mute, begun]


def ordinary(server: Server) -> None:
    assert len(server.tokens("an ordinary call", max_tokens=3, ignore_eos=True)) == 3


@pytest.fixture(autouse=True)
def unharmed(server: Server, first: tuple[int, int]) -> Iterator[None]:
    """Whatever was done: the same processes, an ordinary call, empty queues, and memory and files go back."""
    front, worker = psutil.Process(server.process.pid), server.worker.pid
    files = front.num_fds()
    yield
    ordinary(server)
    server.wait_idle()
    assert server.worker.pid == worker
    # One more for a connection of the metrics' reader.
    wait_until("the open files of before", lambda: front.num_fds() <= files + 1)
    assert front.memory_info().rss - first[0] < MEMORY


def called(server: Server, body: bytes, metadata: Any = (), path: str = GENERATE, **options: str) -> Answer:
    with Wire(server.address) as wire:
        wire.start().read()
        return wire.answer(wire.call(path, body, metadata, **options))


# ---- floods ----


@pytest.mark.parametrize("body", [b"", WHOLE], ids=["headers", "requests"])
def test_rapid_resets(server: Server, body: bytes) -> None:
    """gRPC's own limits would answer the neighbours CANCELLED, one time in three."""
    for _ in range(4):
        with Wire(server.address) as wire:
            wire.start().read()
            for _ in range(40):
                frames: list[Frame] = []
                for _ in range(100):
                    frames.append(wire.headers(GENERATE))
                    stream = frames[-1].stream_id
                    if body:
                        frames.append(DataFrame(stream, data=body, flags=["END_STREAM"]))
                    frames.append(wire.reset(stream))
                wire.send(*frames)
            ordinary(server)


def test_more_streams_than_a_connection_may_have(server: Server) -> None:
    """Refused in the way that clients try again; the others are not held up by them."""
    with Wire(server.address) as wire:
        wire.start().read()
        most = wire.settings[SettingsFrame.MAX_CONCURRENT_STREAMS]
        streams = [wire.open(GENERATE) for _ in range(most + 100)]
        wire.read_until("a refusal", lambda: streams[-1] in wire.answers)
        assert {wire.answers[stream].reset for stream in streams[most:]} == {REFUSED_STREAM}
        assert not wire.answers.keys() & set(streams[:most])
        ordinary(server)


@pytest.mark.parametrize("reads", [True, False])
def test_a_flood_of_pings(server: Server, reads: bool) -> None:
    with Wire(server.address) as wire:
        wire.start()
        for _ in range(100):
            wire.send(*[PingFrame(opaque_data=b"12345678")] * 100)
        if reads:
            wire.wait_closed()
            # What it says may be lost: a socket with unread bytes is closed at once.
            assert wire.goaway in (ENHANCE_YOUR_CALM, None)
        ordinary(server)


FLOODS: dict[str, Frame] = {
    "settings": SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 70000}),
    "priorities": PriorityFrame(1, depends_on=3, stream_weight=5),
    "empty bodies": DataFrame(1),
    "windows": WindowUpdateFrame(1, 1),
    "unknown frames": ExtensionFrame(0xBE, 0, flag_byte=0, body=b"x" * 16),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_of_other_frames(server: Server, kind: str) -> None:
    """100,000 of them, and nothing that comes back is read."""
    with Wire(server.address, receive_buffer=4096) as wire:
        wire.start()
        wire.open(GENERATE)
        wire.socket.settimeout(2)
        for _ in range(100):
            wire.send_bytes(FLOODS[kind].serialize() * 1000)
            if wire.closed:
                break
        ordinary(server)


def test_headers_without_an_end(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.start().read()
        begin = wire.headers(GENERATE)
        begin.flags.discard("END_HEADERS")
        wire.send(begin)
        # A literal field that is not indexed: x-a: aaaa...
        field = b"\x00\x03x-a\x64" + b"a" * 100
        for _ in range(1000):
            wire.send(ContinuationFrame(begin.stream_id, data=field * 100))
        wire.send(ContinuationFrame(begin.stream_id, data=field, flags=["END_HEADERS"]))
        answer = wire.answer(begin.stream_id)
        assert wire.closed or answer.status == RESOURCE_EXHAUSTED
        ordinary(server)


def test_headers_that_unpack_to_megabytes(server: Server) -> None:
    """One field of 3 KB that is put into the table, and 16,000 bytes that each stand for it."""
    with Wire(server.address) as wire:
        wire.start().read()
        frame = wire.headers(GENERATE)
        frame.data += b"\x40\x03x-a\x7f\xb9\x16" + b"a" * 3000 + b"\xbe" * 12000
        wire.send(frame)
        answer = wire.answer(frame.stream_id)
        assert wire.closed or answer.status == RESOURCE_EXHAUSTED


# ---- connections that say nothing ----


def test_idle_connections(server: Server) -> None:
    front = psutil.Process(server.process.pid)
    files, memory = front.num_fds(), front.memory_info().rss
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = 1000 if limit == resource.RLIM_INFINITY else min(1000, limit - 200)
    with wires(server.address, count) as idle:
        for wire in idle:
            wire.start()
        wait_until("all connections", lambda: front.num_fds() >= files + count)
        ordinary(server)
        assert front.memory_info().rss - memory < 60 * MB
        assert idle[-1].read() and not idle[-1].closed


def test_half_sent_messages(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.start()
        bounded = [wire.open(GENERATE, [("grpc-timeout", "300m")]) for _ in range(50)]
        unbounded = [wire.open(STREAM_GENERATE) for _ in range(50)]
        for stream in (*bounded, *unbounded):
            wire.body(stream, WHOLE[:9], end=False)
        assert {wire.answer(stream).status for stream in bounded} == {DEADLINE_EXCEEDED}
        assert not wire.answers.keys() & set(unbounded)
        ordinary(server)
        wire.body(unbounded[7], WHOLE[9:])  # the rest comes late
        assert wire.answer(unbounded[7]).status == OK


def test_more_connections_than_files(start_server: Callable[..., Server], long_llama: Path) -> None:
    """The rest are turned away, and the server can still restart its worker and be measured."""
    small = start_server(long_llama, open_files=600)
    ordinary(small)
    with wires(small.address, 700) as many:
        for wire in many:
            wire.start()
        many[-1].wait_closed()
        assert many[0].read() and not many[0].closed
        small.worker.kill()
        wait_until("the restart", lambda: small.server_info().worker_restarts == 1)
        wait_until("SERVING", lambda: small.health_of() == health_pb2.HealthCheckResponse.SERVING)
        ordinary(small)
        assert small.occupancy() == (0, 0, 0)
    with Wire(small.address) as wire:
        wait_until("a place for a new one", lambda: wire.start().read())


# ---- readers that do not read ----


def stream_body(**fields: Any) -> bytes:
    return grpc_message(serialized(calls.stream_request("slow", ignore_eos=True, **fields)))


def test_a_slow_reader_loses_nothing(server: Server) -> None:
    """What it has not read is one message: its sequences end, their places are free, and it has them all."""
    fields: dict[str, Any] = {"max_tokens": 300, "n": 2, "output_top_k": 1, "temperature": 1.0, "seed": 5}
    expected = calls.tokens_of(server.generate("slow", ignore_eos=True, **fields))
    front = psutil.Process(server.process.pid)
    with Wire(server.address, receive_buffer=4096) as wire:
        wire.start({SettingsFrame.INITIAL_WINDOW_SIZE: 200})
        memory = front.memory_info().rss
        streams = [wire.call(STREAM_GENERATE, stream_body(**fields)) for _ in range(4)]
        wait_until("the streams", lambda: server.occupancy()[0] > 0)
        server.wait_idle(60)
        assert front.memory_info().rss - memory < 40 * MB
        for stream in streams:
            wire.grant(stream, 1 << 24)
        for stream in streams:
            answer = wire.answer(stream)
            assert answer.status == OK and answer.messages < 20
            collected = calls.Collected(
                generation_pb2.StreamGenerateResponse.FromString(payload) for payload in answer.payloads
            )
            assert [collected.tokens[0], collected.tokens[1]] == expected


def test_a_slow_reader_is_bound_by_its_deadline(server: Server) -> None:
    with Wire(server.address, receive_buffer=4096) as wire:
        wire.start({SettingsFrame.INITIAL_WINDOW_SIZE: 0})
        for _ in range(8):
            wire.call(STREAM_GENERATE, stream_body(max_tokens=8000, n=4), [("grpc-timeout", "700m")])
        wait_until("the streams", lambda: server.occupancy()[0] > 0)
        server.wait_idle(10)


def test_a_reader_that_goes_frees_its_place(server: Server) -> None:
    with Wire(server.address, receive_buffer=4096) as wire:
        wire.start({SettingsFrame.INITIAL_WINDOW_SIZE: 0})
        wire.call(STREAM_GENERATE, stream_body(max_tokens=8000, n=8))
        wait_until("the stream", lambda: server.occupancy()[0] > 0)
    server.wait_idle(5)


# ---- bad framing ----

GZIP, DEFLATE = [("grpc-encoding", "gzip")], [("grpc-encoding", "deflate")]
FRAMINGS: dict[str, tuple[bytes, list[tuple[str, str]], set[int]]] = {
    "whole": (WHOLE, [], {OK}),
    "gzip": (grpc_message(gzip.compress(REQUEST), compressed=True), GZIP, {OK}),
    "deflate": (grpc_message(zlib.compress(REQUEST), compressed=True), DEFLATE, {OK}),
    "nothing": (b"", [], {INVALID_ARGUMENT}),
    "cut": (WHOLE[:-1], [], {INVALID_ARGUMENT}),
    "half a header": (WHOLE[:3], [], {INVALID_ARGUMENT}),
    "no header": (REQUEST, [], {INVALID_ARGUMENT, INTERNAL, RESOURCE_EXHAUSTED}),
    "unknown flag": (b"\x02" + WHOLE[1:], [], {INVALID_ARGUMENT, INTERNAL}),
    "4 GB announced": (b"\x00\xff\xff\xff\xff" + REQUEST, [], {RESOURCE_EXHAUSTED}),
    "not named as compressed": (grpc_message(REQUEST, compressed=True), [], {INTERNAL}),
    "not compressed": (grpc_message(REQUEST, compressed=True), GZIP, {INTERNAL}),
    "cut gzip": (grpc_message(gzip.compress(REQUEST)[:-9], compressed=True), GZIP, {INTERNAL}),
    "unknown compression": (WHOLE, [("grpc-encoding", "snappy")], {INTERNAL, UNIMPLEMENTED}),
    "no duration": (WHOLE, [("grpc-timeout", "soon")], {INTERNAL, INVALID_ARGUMENT}),
    "no time": (WHOLE, [("grpc-timeout", "0n")], {DEADLINE_EXCEEDED}),
    "bad base64": (WHOLE, [("x-bin", "\N{POUND SIGN}!")], {OK, INTERNAL}),
    "20 KB of metadata": (WHOLE, [(f"x-{i}", "a" * 2000) for i in range(10)], {RESOURCE_EXHAUSTED}),
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_framing(server: Server, name: str) -> None:
    """INTERNAL comes from gRPC itself, before any of our code: it is what its other servers say too."""
    body, metadata, expected = FRAMINGS[name]
    assert called(server, body, metadata).status in expected


def test_metadata_is_refused_by_its_size_alone(server: Server) -> None:
    """Between 8 and 16 KiB gRPC's own limits refuse at random."""
    metadata = [("x-long", "a" * 14000)]
    assert {called(server, WHOLE, metadata).status for _ in range(20)} == {OK}


@pytest.mark.parametrize(
    "path", ["/salver.v1.GenerationService/Levitate", "/a/b", "/", "nonsense", "/" * 999]
)
def test_unknown_methods(server: Server, path: str) -> None:
    assert called(server, WHOLE, path=path).status == UNIMPLEMENTED


@pytest.mark.parametrize("content_type", ["text/html", "", "application/grpc+json"])
def test_another_content_type(server: Server, content_type: str) -> None:
    """gRPC's core does not look at it; whatever it says one day, it is an answer."""
    answer = called(server, WHOLE, content_type=content_type)
    assert answer.status is not None or answer.headers[":status"] == "415"


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
def test_a_compression_bomb(server: Server, kind: str) -> None:
    """300 KB that would be 300 MB; eight at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if kind == "gzip" else 15)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
    front = psutil.Process(server.process.pid)
    before, peak = front.memory_info().rss, 0
    with wires(server.address, 8) as several:
        streams = []
        for wire in several:
            wire.start().read()
            streams.append(
                wire.call(GENERATE, grpc_message(bomb, compressed=True), [("grpc-encoding", kind)])
            )
        for wire, stream in zip(several, streams, strict=True):
            while not wire.answers.get(stream, Answer()).ended:
                peak = max(peak, front.memory_info().rss)
                assert wire.read(0.05) or not wire.closed
            assert wire.answers[stream].status == RESOURCE_EXHAUSTED
    assert peak - before < 8 * 40 * MB  # the limit of a message is 16 MiB


GREETINGS = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\x42" * 190,
    "noise": b"\xff\x00" * 5000,
    "a wrong frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x04\x00\x00\x00\x00\x00" * 50,
    "a stream twice": b"",
}


@pytest.mark.parametrize("kind", GREETINGS)
def test_what_is_no_http2(server: Server, kind: str) -> None:
    with Wire(server.address) as wire:
        if GREETINGS[kind]:
            wire.send_bytes(GREETINGS[kind])
        else:
            frame = wire.start().headers(GENERATE)
            wire.send(frame, frame)
        wait_closed(wire)


def wait_closed(wire: Wire) -> None:
    """Reads whatever it has to say, HTTP/2 or not, until it hangs up. TimeoutError after 20 s of nothing."""
    wire.socket.settimeout(20)
    try:
        while wire.socket.recv(1 << 16):
            pass
    except ConnectionError:
        pass


def test_silent_connections_are_closed(server: Server, silent: list[Wire]) -> None:
    """The last test: they began with the module, and have 10 seconds."""
    start = time.monotonic()
    for wire in silent:
        wait_closed(wire)
    assert time.monotonic() - start < 20
