"""Messages between the front and the worker: length-prefixed pickles over a socket pair.

A frame is eight bytes (native unsigned length) and one pickle of protocol 5. Both ends
are processes of one version on one machine, and the front starts the worker, so the
pickles are trusted. This module holds the framing and the worker's blocking half;
the front's half is in `async_channel` (the worker needs no event loop).
"""

from __future__ import annotations

import math
import pickle
import select
import socket
import struct

_HEADER = struct.Struct("=Q")
_RECEIVE_SIZE = 1 << 18


class ChannelClosed(Exception):
    """The other side closed the channel, or ended."""


def encode_frame(message: object) -> bytes:
    """One frame holding the message, which must be picklable."""
    body = pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = _HEADER.size  # bytes the buffer must hold before there is more to do

    def feed(self, received: bytes) -> list[object]:
        """The messages that `received` completed, in order; the rest is kept for the next call."""
        buffer = self._buffer
        buffer += received
        if len(buffer) < self._wanted:
            return []
        messages: list[object] = []
        position = 0
        with memoryview(buffer) as view:
            while True:
                body = position + _HEADER.size
                if len(buffer) < body:
                    self._wanted = _HEADER.size
                    break
                end = body + _HEADER.unpack_from(buffer, position)[0]
                if len(buffer) < end:
                    self._wanted = end - position
                    break
                with view[body:end] as frame:
                    messages.append(pickle.loads(frame))
                position = end
        del buffer[:position]
        return messages


class Channel:
    """The worker's half: blocking, for one thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the socket over (a connected stream socket)."""
        sock.setblocking(True)
        self._socket = sock
        self._decoder = FrameDecoder()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._closed = False

    def send(self, message: object) -> None:
        """Sends one message, waiting while the pipe is full. Raises ChannelClosed."""
        try:
            self._socket.sendall(encode_frame(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the front closed the channel") from error

    def poll(self, timeout: float) -> list[object]:
        """All whole messages waiting, in order; waits up to `timeout` seconds while there is none.

        Raises ChannelClosed once the other side has closed and everything it sent was returned.
        Part of a message ends the wait with an empty list: call again.
        """
        if self._closed:
            raise ChannelClosed("the front closed the channel")
        messages: list[object] = []
        if not self._poll.poll(math.ceil(timeout * 1000)):
            return messages
        while True:
            try:
                received = self._socket.recv(_RECEIVE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except ConnectionResetError:
                received = b""
            if not received:
                self._closed = True
                if messages:
                    return messages
                raise ChannelClosed("the front closed the channel")
            messages += self._decoder.feed(received)

    def close(self) -> None:
        """Closes the socket; the other side reads the end of the stream. May be called twice."""
        self._closed = True
        self._socket.close()
