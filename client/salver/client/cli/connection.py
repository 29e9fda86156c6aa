"""How the command line connects: the address, TLS, the token."""

from __future__ import annotations

import argparse
import os

from salver.client.admin import ADMIN_ADDRESS
from salver.client.client import Client
from salver.client.options import ConnectionOptions
from salver.client.security import BearerToken, Tls, token_from_file

ADDRESS = "127.0.0.1:50051"
_TLS_FLAGS = (
    ("ca", "FILE", "PEM file of the authorities that may vouch for the server; turns TLS on"),
    ("cert", "FILE", "PEM file of a certificate to show to the server"),
    ("key", "FILE", "PEM file of its private key"),
    ("server-name", "NAME", "what the server's certificate is for, where that is not the address"),
)


class UsageError(Exception):
    """What was given cannot be used; the message is for a person."""


def add_connection_flags(parser: argparse.ArgumentParser, admin: bool = False) -> None:
    """`admin`: of one server's admin port."""
    variable, default = ("SALVER_ADMIN_ADDRESS", ADMIN_ADDRESS) if admin else ("SALVER_ADDRESS", ADDRESS)
    several = "server, or of several with commas between them, or a gRPC target like dns:///name:port"
    parser.add_argument(
        "--address",
        default=os.environ.get(variable, default),
        help=f"of the {'admin port' if admin else several} ({variable}; default {default})",
    )
    group = parser.add_argument_group("security")
    group.add_argument(
        "--tls", action="store_true", default=os.environ.get("SALVER_TLS") == "true",
        help="TLS with the usual authorities (SALVER_TLS=true); the flags below turn it on too",
    )  # fmt: skip
    for name, metavar, text in _TLS_FLAGS:
        variable = f"SALVER_TLS_{name.replace('-', '_').upper()}"
        group.add_argument(
            f"--tls-{name}", metavar=metavar, default=os.environ.get(variable), help=f"{text} ({variable})"
        )
    group.add_argument(
        "--token-file", metavar="FILE", default=os.environ.get("SALVER_TOKEN_FILE"),
        help="its first line is the bearer token (SALVER_TOKEN_FILE; or the token itself in SALVER_TOKEN: "
        "on a command line everybody could read it)",
    )  # fmt: skip


def connection_options(options: argparse.Namespace) -> ConnectionOptions:
    """Raises UsageError."""
    tls = None
    if options.tls or options.tls_ca or options.tls_cert or options.tls_key or options.tls_server_name:
        try:
            tls = Tls(options.tls_ca, options.tls_cert, options.tls_key, options.tls_server_name)
        except ValueError as error:
            raise UsageError(f"--tls-cert and --tls-key: {error}") from error
    token: BearerToken | None = os.environ.get("SALVER_TOKEN") or None
    if options.token_file is not None:
        token = token_from_file(options.token_file)
        try:
            token()
        except (OSError, ValueError) as error:
            raise UsageError(f"--token-file {options.token_file}: cannot be read: {error}") from error
    return ConnectionOptions(tls=tls, token=token)


def connect(options: argparse.Namespace) -> Client:
    """A client as the flags say. Raises UsageError and AddressError."""
    try:
        return Client(options.address, connection_options(options))
    except OSError as error:
        raise UsageError(f"--tls-ca, --tls-cert, --tls-key: {error}") from error
