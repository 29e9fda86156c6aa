"""The front's half of the channel to the worker, on an asyncio loop (framing: `channel`)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from salver.server.engine.channel import ChannelClosed, FrameDecoder, encode_frame


class AsyncChannel(asyncio.Protocol):
    """Sends without blocking and keeps order; hands every received message to `on_message`.

    What is sent within one turn of the loop goes out as one write, so that a worker that wakes for the
    first of a call's inputs finds all of them.

    What the worker has not read yet is queued here without bound: the bound is
    admission's, which counts requests. `on_closed` is called once, after the last message,
    when the other side closed or `close` was called.
    """

    def __init__(self, on_message: Callable[[object], None], on_closed: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._closed = False
        self._unsent: list[bytes] = []

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Callable[[object], None], on_closed: Callable[[], None]
    ) -> AsyncChannel:
        """Takes over a connected Unix stream socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_message, on_closed), sock=sock)
        return channel

    def send(self, message: object) -> None:
        """Queues one message. Raises ChannelClosed when the channel is already known to be closed."""
        if self._transport is None or self._closed or self._transport.is_closing():
            raise ChannelClosed("the worker's channel is closed")
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(encode_frame(message))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and self._transport is not None and not self._closed:
            self._transport.write(b"".join(unsent))

    def close(self) -> None:
        """Closes at once; what was queued and not written yet is dropped. May be called twice."""
        if self._transport is not None:
            self._flush()
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._on_closed()
