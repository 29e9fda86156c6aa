"""TLS of the port, its certificates replaced without a restart."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from salver.server.reloading import BadFile, Reloading, read

_Configuration = grpc.ServerCertificateConfiguration


def server_credentials(
    cert: Path | None,
    key: Path | None,
    client_ca: Path | None,
    prefix: str = "--tls",
    reloaded: Callable[[str, bool], None] = lambda what, good: None,
) -> grpc.ServerCredentials | None:
    """What --tls-cert, --tls-key and --tls-client-ca say (or flags of another prefix); None for plaintext.

    gRPC asks for the certificate before each handshake, on a thread of its own; connections that
    stand keep the one they began with. Raises BadFile.
    """
    if cert is None or key is None:
        return None
    paths = [cert, key] if client_ca is None else [cert, key, client_ca]
    what = prefix.removeprefix("--").replace("-", "_")
    files = Reloading(what, paths, lambda: _load(cert, key, client_ca, prefix), reloaded)
    last = [files.current()]

    def fetch() -> Any:  # None where nothing has changed
        newest = files.current()
        if newest is last[0]:
            return None
        last[0] = newest
        return newest

    return grpc.dynamic_ssl_server_credentials(last[0], fetch, client_ca is not None)


def _load(cert: Path, key: Path, client_ca: Path | None, prefix: str) -> _Configuration:
    """Raises BadFile. OpenSSL's opinion is asked first: gRPC says only that handshakes fail."""
    chain, private = read(cert, f"{prefix}-cert"), read(key, f"{prefix}-key")
    roots = None if client_ca is None else read(client_ca, f"{prefix}-client-ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key asks nobody for its password.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise BadFile(
            f"{prefix}-cert {cert} and {prefix}-key {key}: not a certificate chain and its unencrypted key "
            f"in PEM: {error}"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise BadFile(f"{prefix}-client-ca {client_ca}: not certificates in PEM: {error}") from None
    return grpc.ssl_server_certificate_configuration([(private, chain)], roots)
