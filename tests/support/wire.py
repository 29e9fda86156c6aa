"""HTTP/2 by hand: frames as no gRPC library would send them, and what comes back."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GENERATE = "/salver.v1.GenerationService/Generate"
STREAM_GENERATE = "/salver.v1.GenerationService/StreamGenerate"
GET_SERVER_INFO = "/salver.v1.ModelService/GetServerInfo"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
CANCEL = 8  # the error code of RST_STREAM
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11


def grpc_message(payload: bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC frames it: a flag, four bytes of length, the bytes."""
    return struct.pack(">BI", compressed, len(payload)) + payload


@dataclass
class Answer:
    """What came back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)  # of all header blocks, trailers too
    body: bytes = b""
    ended: bool = False
    reset: int | None = None  # the error code of RST_STREAM

    @property
    def status(self) -> int | None:
        """The gRPC status, None where there is none (yet)."""
        code = self.headers.get("grpc-status")
        return None if code is None else int(code)

    @property
    def payloads(self) -> list[bytes]:
        """The whole gRPC messages in the body."""
        found, at = [], 0
        while at + 5 <= len(self.body):
            end = at + 5 + int(struct.unpack(">I", self.body[at + 1 : at + 5])[0])
            if end > len(self.body):
                break
            found.append(self.body[at + 5 : end])
            at = end
        return found

    @property
    def messages(self) -> int:
        return len(self.payloads)


class Wire:
    """One connection. It reads only when told, and answers settings and pings then.

    `closed` once the peer has hung up.
    """

    def __init__(self, address: str, *, receive_buffer: int | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket(socket.AF_INET)
        if receive_buffer is not None:  # before connecting, or the window is agreed already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect((host, int(port)))
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None  # its error code
        self.settings: dict[int, int] = {}  # the peer's
        self.closed = False
        self._encoder, self._decoder = Encoder(), Decoder()
        self._pending = b""
        self._next_stream = 1
        self._started = False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # ---- sending ----

    def send_bytes(self, content: bytes) -> None:
        """Raises nothing when the peer has hung up: that is an answer too."""
        try:
            self.socket.sendall(content)
        except (ConnectionError, TimeoutError):
            self.closed = True

    def send(self, *frames: Frame) -> None:
        self.send_bytes(b"".join(frame.serialize() for frame in frames))

    def start(self, settings: dict[int, int] | None = None) -> Wire:
        """The client's preface."""
        self._started = True
        self.send_bytes(PREFACE + SettingsFrame(settings=settings or {}).serialize())
        return self

    def headers(
        self,
        path: str,
        extra: Iterable[tuple[str, str]] = (),
        *,
        content_type: str = "application/grpc",
        end: bool = False,
    ) -> HeadersFrame:
        """The frame that opens the next stream. Blocks above 16 KiB are not split: keep `extra` short."""
        fields = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
            ("te", "trailers"), ("content-type", content_type), *extra,
        ]  # fmt: skip
        frame = HeadersFrame(self._next_stream, data=self._encoder.encode(fields), flags=["END_HEADERS"])
        if end:
            frame.flags.add("END_STREAM")
        self._next_stream += 2
        return frame

    def open(self, path: str, extra: Iterable[tuple[str, str]] = (), **options: str) -> int:
        """Opens a stream; its number."""
        frame = self.headers(path, extra, content_type=options.get("content_type", "application/grpc"))
        self.send(frame)
        return frame.stream_id

    def call(self, path: str, content: bytes, extra: Iterable[tuple[str, str]] = (), **options: str) -> int:
        """Opens a stream, sends `content` (of any length) as its whole body. Its number."""
        stream = self.open(path, extra, **options)
        self.body(stream, content)
        return stream

    def body(self, stream: int, content: bytes, *, end: bool = True) -> None:
        """Flow control is not kept where `content` is larger than the window."""
        chunks = [content[i : i + 16384] for i in range(0, len(content), 16384)] or [b""]
        frames = [DataFrame(stream, data=chunk) for chunk in chunks]
        if end:
            frames[-1].flags.add("END_STREAM")
        self.send(*frames)

    def reset(self, stream: int) -> RstStreamFrame:
        return RstStreamFrame(stream, error_code=CANCEL)

    def grant(self, stream: int, bytes_: int) -> None:
        """More of the flow-control window, for the stream and the connection."""
        self.send(WindowUpdateFrame(stream, bytes_), WindowUpdateFrame(0, bytes_))

    # ---- receiving ----

    def read(self, timeout: float = 20.0) -> bool:
        """Takes what is there, at least one frame. False when none came within `timeout` s or ever will."""
        self.socket.settimeout(max(timeout, 0.001))
        seen = False
        while not seen:
            try:
                content = self.socket.recv(1 << 16)
            except TimeoutError:
                return False
            except ConnectionError:
                content = b""
            if not content:
                self.closed = True
                return False
            self._pending += content
            for frame in self._frames():
                self._take(frame)
                seen = True
        return True

    def read_until(self, what: str, condition: Callable[[], object], timeout: float = 30.0) -> None:
        """Reads until `condition`; AssertionError naming `what` when it cannot come any more."""
        end = time.monotonic() + timeout
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"not within {timeout} s: {what}"
            if not self.read(left) and self.closed:
                assert condition(), f"the server hung up before: {what}"

    def answer(self, stream: int, timeout: float = 30.0) -> Answer:
        """Reads until the stream has ended, was reset, or the server hung up."""
        found = self.answers.setdefault(stream, Answer())
        self.read_until(
            f"the end of stream {stream}",
            lambda: found.ended or found.reset is not None or self.closed,
            timeout,
        )
        return found

    def wait_closed(self, timeout: float = 30.0) -> None:
        self.read_until("the end of the connection", lambda: self.closed, timeout)

    def _frames(self) -> Iterator[Frame]:
        while len(self._pending) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self._pending[:9]))
            if len(self._pending) < 9 + length:
                return
            frame.parse_body(memoryview(self._pending[9 : 9 + length]))
            self._pending = self._pending[9 + length :]
            yield frame

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, SettingsFrame):
            self.settings.update(frame.settings)
            if "ACK" not in frame.flags and self._started:  # the peer's windows hold from then on
                self.send(SettingsFrame(flags=["ACK"]))
        elif isinstance(frame, PingFrame):
            if "ACK" not in frame.flags:
                self.send(PingFrame(opaque_data=frame.opaque_data, flags=["ACK"]))
        elif isinstance(frame, GoAwayFrame):
            self.goaway = frame.error_code
        elif frame.stream_id and isinstance(frame, HeadersFrame | DataFrame | RstStreamFrame):
            answer = self.answers.setdefault(frame.stream_id, Answer())
            if isinstance(frame, HeadersFrame):
                answer.headers.update(self._decoder.decode(frame.data))
            elif isinstance(frame, DataFrame):
                answer.body += frame.data
            else:
                answer.reset = frame.error_code
            answer.ended |= "END_STREAM" in frame.flags


@contextmanager
def wires(address: str, count: int) -> Iterator[list[Wire]]:
    """So many connections at once."""
    found: list[Wire] = []
    try:
        for _ in range(count):
            found.append(Wire(address))
        yield found
    finally:
        for wire in found:
            wire.socket.close()
