"""Printing: tables and JSON, with rich where it is installed and the reader is a terminal."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table: rich's on a terminal, else columns of plain text."""
    texts = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError:
            pass
        else:
            drawn = Table(*columns)
            for row in texts:
                drawn.add_row(*map(Text, row))
            Console().print(drawn)
            return
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in [list(columns), *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def as_json(value: Any) -> None:
    """Dataclasses as objects, enums by value, bytes as text (broken characters replaced)."""
    print(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(f"no JSON for {type(value).__name__}")


def read_text(argument: str) -> str:
    """The argument, or all of standard input for "-"."""
    return sys.stdin.read() if argument == "-" else argument
