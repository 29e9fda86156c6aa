"""The `salver` command: one subcommand per RPC, and those that other parts add.

Other distributions add subcommands by the entry-point group `salver.commands`: a function
that takes the arguments after the subcommand's name and returns the exit code. It is loaded
only when called, so that `salver --help` stays quick.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

from salver.client.addresses import AddressError
from salver.client.cli.arguments import build_parser
from salver.client.cli.connection import UsageError
from salver.client.errors import SalverError

GROUP = "salver.commands"


def main(argv: list[str] | None = None) -> int:
    """Runs a command line. 0 is success, 1 a failed call, 2 bad usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    plugins = {entry.name: entry for entry in entry_points(group=GROUP)}
    try:
        if arguments and arguments[0] in plugins:
            return int(plugins[arguments[0]].load()(arguments[1:]))
        options = build_parser(sorted(plugins)).parse_args(arguments)
        return int(options.run(options) or 0)
    except SalverError as error:
        print(f"salver: {error}", file=sys.stderr)
        if error.retry_after is not None:
            print(f"  try again in {error.retry_after:g} s", file=sys.stderr)
        return 1
    except AddressError as error:
        print(f"salver: --address: {error}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"salver: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left (head, less); the interpreter's last flush would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


__all__ = ["main"]
