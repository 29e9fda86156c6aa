"""What a flag of `salver serve` is made of: how its words are read, and its row in the table of flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

import configargparse


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise configargparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            raise configargparse.ArgumentTypeError(f"{value} must be {bounds}")
        return value

    return parse


_SIZE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: factor**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, factor in (("iB", 1024), ("i", 1024), ("B", 1000), ("", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `1.5GiB`, `2GB` (thousands) or a bare number of bytes; above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and next((u for u in _SIZE_UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise configargparse.ArgumentTypeError(f"{text!r} is not a size; write for example 512MiB or 2GiB")
    size = int(float(match[1]) * _SIZE_UNITS[unit])
    if size < 1:
        raise configargparse.ArgumentTypeError(f"{text!r} must be above 0")
    return size


def parse_share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        share = float(text)
    except ValueError:
        raise configargparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.0 < share <= 1.0:
        raise configargparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return share


_SECONDS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of `30`, `30s`, `500ms`, `5m` or `1h`; at least 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|)\s*", text)
    if match is None:
        raise configargparse.ArgumentTypeError(f"{text!r} is not a duration; write for example 30s or 5m")
    return float(match[1]) * _SECONDS[match[2]]


def port_or_off(text: str) -> int | None:
    """A port; None of `off` (or of a negative number)."""
    if text.strip().lower() == "off" or re.fullmatch(r"-\d+", text.strip()):
        return None
    return integer(0, 65535)(text)


def message_size(text: str) -> int:
    """As `parse_size`, of what gRPC can send."""
    size = parse_size(text)
    if size > 2**31 - 1:
        raise configargparse.ArgumentTypeError(f"{text!r} must be below 2GiB")
    return size


def named_directories(text: str) -> tuple[tuple[str, str], ...]:
    """Names and directories of `a=DIR,b=DIR`."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, sign, directory = part.strip().partition("=")
        if not (name and sign and directory):
            raise configargparse.ArgumentTypeError(f"{part!r}: NAME=DIR was expected")
        if name in found:
            raise configargparse.ArgumentTypeError(f"the name {name!r} is there twice")
        found[name] = directory
    return tuple(found.items())


def printable_name(text: str) -> str:
    """1 to 256 printable characters."""
    if not text.strip() or len(text) > 256 or not text.isprintable():
        raise configargparse.ArgumentTypeError("must be 1 to 256 printable characters")
    return text


def flag(
    default: Any,
    group: str,
    text: str,
    *,
    parse: Callable[[str], Any] = str,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    shown: str | None = None,
    negated: bool = False,
) -> Any:
    """A row of the table. `shown` is the default as the help says it; `negated` makes it `--no-...`."""
    row = {
        "group": group, "help": text, "parse": parse, "metavar": metavar,
        "choices": choices, "shown": shown, "negated": negated,
    }  # fmt: skip
    if default is dataclasses.MISSING:
        return field(metadata=row)
    return field(default=default, metadata=row)
