"""`salver serve`, `salver pull` and `salver token`: what the server adds to the client's command line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import FrameType


def command(argv: list[str]) -> int:
    """Serve a model over gRPC.

    `argv` are the words after `serve`. Returns the exit status: 0 after a clean end, 1 when
    it could not start, 2 for a bad command line.
    """
    # The first process of a container has no default for a signal: one that came before the server
    # handles it would be lost, and the container killed a grace period later.
    signal.signal(signal.SIGTERM, _end_at_once)
    # Imported here, so that a command line that only lists its subcommands stays fast.
    from salver.server.app import run
    from salver.server.config import parse_config
    from salver.server.loading import StartError
    from salver.server.log import set_up_logging

    try:
        config = parse_config(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    set_up_logging(config.log_level, form=config.log_format)
    try:
        return asyncio.run(run(config))
    except StartError as error:
        print(f"salver serve: {error}", file=sys.stderr, flush=True)
        return 1


def pull(argv: list[str]) -> int:
    """Fetches a model into the cache, as `salver serve` with the same words would, and serves nothing.

    Converts it too, where that is needed: a later `salver serve` starts at once, and `--offline`.
    """
    from salver.server.config import parse_config
    from salver.server.loading import StartError, find_checkpoint, find_speculative_checkpoint
    from salver.server.log import set_up_logging

    try:
        config = parse_config(argv, prog="salver pull")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    set_up_logging(config.log_level, form=config.log_format)
    try:
        checkpoint, _ = find_checkpoint(config)
        find_speculative_checkpoint(config, checkpoint)
    except StartError as error:
        print(f"salver pull: {error}", file=sys.stderr, flush=True)
        return 1
    print(checkpoint, flush=True)
    return 0


def token(argv: list[str]) -> int:
    """Draws a bearer token and prints it, and the entry of the file of `--tokens` that admits it."""
    import argparse
    import secrets
    from hashlib import sha256

    parser = argparse.ArgumentParser(
        prog="salver token",
        description="Draw a bearer token. It is printed once and kept nowhere; the entry below it goes into "
        "the file of `salver serve --tokens`, and admits it there within a second.",
    )
    parser.add_argument("tenant", help="whose token it is")
    tenant = parser.parse_args(argv).tenant
    drawn = f"salver_{secrets.token_urlsafe(32)}"
    print(f"{drawn}\n", flush=True)
    print(f'[[tokens]]\nsha256 = "{sha256(drawn.encode()).hexdigest()}"\ntenant = "{tenant}"')
    return 0


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
