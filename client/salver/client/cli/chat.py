"""`salver chat`: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from salver.client.cli.commands import print_stream
from salver.client.cli.connection import connect
from salver.client.cli.output import as_json, read_text
from salver.client.client import Client
from salver.client.errors import SalverError
from salver.client.types import Message

HELP = """/help           this
/reset          forget the conversation
/system TEXT    what the system says first (forgets the conversation)
/exit           leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(options: argparse.Namespace) -> int | None:
    from salver.client.cli.arguments import generation_options

    given = generation_options(options)
    messages = [Message.system(options.system)] if options.system else []
    with connect(options) as client:
        if options.message is None and sys.stdin.isatty():
            return _converse(client, messages, given)
        messages.append(Message.user(read_text(options.message or "-")))
        if options.json:
            as_json(client.chat(messages, **given))
            return None
        with client.stream_chat(messages, **given) as stream:
            print_stream(stream)
    return None


def _converse(client: Client, messages: list[Message], given: dict[str, Any]) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() history and editing)
    print(f"{client.get_model().name}. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                return 0
            messages = _command(line, messages)
        elif line:
            messages = _answer(client, [*messages, Message.user(line)], given)


def _command(line: str, messages: list[Message]) -> list[Message]:
    name, _, text = line.partition(" ")
    if name == "/reset":
        return [m for m in messages[:1] if m.role.value == "system"]
    if name == "/system":
        return [Message.system(text)] if text else []
    print(HELP if name == "/help" else f"no such command: {name}\n{HELP}")
    return messages


def _answer(client: Client, messages: list[Message], given: dict[str, Any]) -> list[Message]:
    """Prints the answer; what was said of a stopped one stays in the conversation."""
    with client.stream_chat(messages, **given) as stream:
        try:
            print_stream(stream)
        except KeyboardInterrupt:
            print()
        except SalverError as error:
            print(f"salver: {error}", file=sys.stderr)
            return messages[:-1]
        return [*messages, Message.assistant(stream.result.text)]
