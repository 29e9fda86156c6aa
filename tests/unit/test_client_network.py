"""What lies between client and server: streams that are reset, push-back, names of several servers, TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from salver.client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionOptions,
    ResourceExhausted,
    Unavailable,
)
from salver.client.testing import FakeServer

ONCE = ConnectionOptions(max_attempts=1)
DATA, RST_STREAM = 0, 3  # kinds of HTTP/2 frames


class ResettingProxy:
    """Passes HTTP/2 on, and resets the first stream that answers after so many messages, as a proxy may."""

    def __init__(self, address: str, error_code: int, after: int) -> None:
        self._upstream = address.rpartition(":")
        self._error_code = error_code
        self._left = after + 1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._upstream[0], int(self._upstream[2])))
            except OSError:  # the one or the other is closed: the test is over
                return
            threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pass_frames, args=(server, client), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with source, sink:
            try:
                while received := source.recv(1 << 16):
                    sink.sendall(received)
            except OSError:
                pass

    def _pass_frames(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink, source.makefile("rb") as frames:
            try:
                while header := frames.read(9):
                    length, kind = int.from_bytes(header[:3]), header[3]
                    stream = int.from_bytes(header[5:]) & 0x7FFFFFFF
                    body = frames.read(length)
                    self._left -= kind == DATA and length > 0
                    if self._left == 0:
                        self._left = -1
                        sink.sendall(struct.pack(">BHBBII", 0, 4, RST_STREAM, 0, stream, self._error_code))
                    # What was on its way to a stream that is reset comes all the same and counts not.
                    sink.sendall(header + body)
            except OSError:
                pass


def read(address: str) -> tuple[str, int]:
    with Client(address, ONCE) as client, client.stream_generate("two words", seed=7) as stream:
        return "".join(delta.text for delta in stream), stream.resumptions


def read_async(address: str) -> tuple[str, int]:
    async def run() -> tuple[str, int]:
        async with (
            AsyncClient(address, ONCE) as client,
            client.stream_generate("two words", seed=7) as stream,
        ):
            return "".join([delta.text async for delta in stream]), stream.resumptions

    return asyncio.run(run())


@pytest.mark.parametrize("reader", [read, read_async])
@pytest.mark.parametrize(
    ("error_code", "raises"),
    [
        pytest.param(0x0, None, id="NO_ERROR"),
        pytest.param(0x2, None, id="INTERNAL_ERROR"),
        pytest.param(0x7, None, id="REFUSED_STREAM"),
        pytest.param(0x8, Cancelled, id="CANCEL"),
        pytest.param(0xB, ResourceExhausted, id="ENHANCE_YOUR_CALM"),
    ],
)
def test_a_stream_that_a_proxy_resets(
    reader: Callable[[str], tuple[str, int]], error_code: int, raises: type[Exception] | None
) -> None:
    """A lost stream goes on; one that was cancelled, or was too much for somebody, has its answer."""
    with FakeServer(delay=0.01) as fake:
        whole, _ = reader(fake.address)
        fake.requests.clear()
        proxy = ResettingProxy(fake.address, error_code, after=3)
        try:
            if raises is None:
                assert reader(proxy.address) == (whole, 1)
                assert len(fake.requests) == 2
            else:
                with pytest.raises(raises):
                    reader(proxy.address)
                assert len(fake.requests) == 1
        finally:
            proxy.close()


def test_a_server_that_asks_not_to_be_asked_again() -> None:
    """A negative push-back: neither gRPC nor the client tries again, in the middle of a stream either."""
    with FakeServer() as fake, Client(fake.address) as client:
        for after in (0, 3):
            fake.requests.clear()
            fake.fail(after=after, retry_after=-1.0)
            with pytest.raises(Unavailable) as caught:
                list(client.stream_generate("two words"))
            assert not caught.value.may_retry
            assert len(fake.requests) == 1
        fake.requests.clear()
        fake.fail(retry_after=-1.0)
        with pytest.raises(Unavailable):
            client.generate("two words")
        assert len(fake.requests) == 1


@contextmanager
def name_server(addresses: list[str]) -> Iterator[str]:
    """host:port of a DNS server that knows IPv4 addresses of every name, and nothing else."""

    def answer(query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5
        kind = int.from_bytes(query[end - 4 : end - 2])
        records = [
            struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(address) for address in addresses
        ]
        found = records if kind == 1 else []
        return (
            query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(found), 0, 0) + query[12:end] + b"".join(found)
        )

    def serve(listener: socket.socket) -> None:
        while True:
            query, sender = listener.recvfrom(4096)
            if not query:
                return
            listener.sendto(answer(query), sender)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.sendto(b"", listener.getsockname())
            thread.join()


@contextmanager
def two_servers() -> Iterator[tuple[FakeServer, FakeServer, int]]:
    """On one port of two addresses of this machine, as the pods of a headless Service."""
    with FakeServer() as one:
        port = int(one.address.rpartition(":")[2])
        other = FakeServer()
        other._server.add_insecure_port(f"127.0.0.2:{port}")
        with other:
            yield one, other, port


def ask_until_both_answered(client: Client, one: FakeServer, other: FakeServer) -> None:
    for _ in range(1000):
        client.generate("x", max_tokens=1)
        if one.requests and other.requests:
            return
    raise AssertionError(f"{len(one.requests)} calls came to the one and {len(other.requests)} to the other")


def test_a_name_that_stands_for_several_servers() -> None:
    places = ["127.0.0.1", "127.0.0.2"]
    with two_servers() as (one, other, port), name_server(places) as names:
        address = f"dns://{names}/salver.test:{port}"
        with Client(address) as client:
            ask_until_both_answered(client, one, other)
            whole = client.generate("two words", seed=7).text
            one.fail(after=2)
            other.fail(after=2)
            with client.stream_generate("two words", seed=7) as stream:
                assert "".join(delta.text for delta in stream) == whole
                assert stream.resumptions
            one.stop()
            assert all(client.generate("two words", seed=7).text == whole for _ in range(4))


def test_a_list_with_a_name_that_stands_for_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def both(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if host != "salver.test":
            return look_up(host, port, *more, **options)
        return [entry for ip in ("127.0.0.1", "127.0.0.2") for entry in look_up(ip, port, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with two_servers() as (one, other, port), FakeServer() as third:
        addresses = [f"salver.test:{port}", third.address]
        with Client(addresses) as client:
            ask_until_both_answered(client, one, other)
            ask_until_both_answered(client, one, third)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """(key, certificate) for salver.test."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", "/CN=salver.test", "-addext", "subjectAltName=DNS:salver.test"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return Path(key).read_bytes(), Path(certificate).read_bytes()


def test_tls_with_an_address_list(certificate: tuple[bytes, bytes]) -> None:
    """As docs/client.md has it: the certificate's name is given, since gRPC knows the servers by IP alone."""
    key, chain = certificate
    servers = FakeServer(), FakeServer()
    credentials = grpc.ssl_server_credentials([(key, chain)])
    ports = [fake._server.add_secure_port("127.0.0.1:0", credentials) for fake in servers]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    one, other = servers
    trusted = grpc.ssl_channel_credentials(chain)
    named = (("grpc.ssl_target_name_override", "salver.test"),)
    with one, other:
        with Client(addresses, ConnectionOptions(credentials=trusted, channel_arguments=named)) as client:
            ask_until_both_answered(client, one, other)
            with client.stream_generate("two words", seed=7) as stream:
                whole = "".join(delta.text for delta in stream)
            one.fail(after=2)
            other.fail(after=2)
            with client.stream_generate("two words", seed=7) as stream:
                assert "".join(delta.text for delta in stream) == whole and stream.resumptions
        refused = ConnectionOptions(credentials=trusted, max_attempts=1, resume_attempts=0)
        with Client(addresses, refused) as client, pytest.raises(Unavailable):
            client.generate("x", timeout=10)  # the certificate is of another name
