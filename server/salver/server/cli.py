"""`salver serve`: the subcommand that the server adds to the client's command line."""

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
    from salver.server.app import StartError, run
    from salver.server.config import parse_config
    from salver.server.log import set_up_logging

    try:
        config = parse_config(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    set_up_logging(config.log_level)
    try:
        return asyncio.run(run(config))
    except StartError as error:
        print(f"salver serve: {error}", file=sys.stderr, flush=True)
        return 1


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
