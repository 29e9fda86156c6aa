"""TLS and bearer tokens of a client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

BearerToken = str | Callable[[], str]


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS. The files are read when the client is made.

    Attributes:
        ca: PEM file of the authorities that may vouch for the server; None is gRPC's own list.
        cert: PEM file of a certificate (and its chain) to show, where the server wants one (mTLS).
        key: PEM file of its private key.
        server_name: what the server's certificate must be for, where that is not the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate needs its key, and a key its certificate")

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError for files that cannot be read."""
        ca, key, cert = (
            None if file is None else Path(file).read_bytes() for file in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)

    def arguments(self) -> list[tuple[str, str]]:
        """Channel arguments that go with the credentials."""
        if self.server_name is None:
            return []
        return [("grpc.ssl_target_name_override", self.server_name)]


def token_from_file(file: str | Path) -> Callable[[], str]:
    """The first line of `file`, read for every call, so that a token can be replaced while calls go on."""
    path = Path(file)

    def read() -> str:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()

    return read
