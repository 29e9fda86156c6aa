"""A TCP relay in front of a server, whose clients can vanish in the ways that clients do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST and not FIN

VANISHING = ("closes", "resets", "falls silent")


class Relay:
    """Passes bytes on, until `vanish()`: the server then hears what it hears of a client that is gone."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._upstream: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: asyncio.Server | None = None
        self._gone = False

    async def open(self) -> str:
        """Listens; the address for clients."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()
        return f"{host}:{port}"

    async def vanish(self, way: str) -> None:
        """Ends (`closes`, `resets`) or stops (`falls silent`) what goes to the server, without a word."""
        assert way in VANISHING, way
        self._gone = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if way == "falls silent":
            return
        for writer in self._upstream:
            if way == "resets":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                writer.transport.abort()
            else:
                writer.close()

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        await self.vanish("closes")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        self._upstream.append(upstream_writer)
        if self._gone:
            upstream_writer.close()
            writer.close()
            return
        self._tasks += [
            asyncio.create_task(self._pass(reader, upstream_writer)),
            asyncio.create_task(self._pass(upstream_reader, writer)),
        ]

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while received := await reader.read(1 << 16):
                writer.write(received)
                await writer.drain()
