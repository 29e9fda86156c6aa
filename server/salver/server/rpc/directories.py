"""Folders that calls name: single names under a root that the server was given, never paths."""

from __future__ import annotations

import re
from pathlib import Path

from salver.server.rpc.errors import Violation, invalid_argument, shortened

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "must be 1 to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"


def is_name(text: str) -> bool:
    """Whether it keeps NAME_RULE. No such name is a path: it has no separator, and is neither . nor .. ."""
    return _NAME.fullmatch(text) is not None


def folder_under(root: Path, name: str, field: str) -> Path:
    """The folder `name` of `root`, links followed. Raises ApiError (INVALID_ARGUMENT), naming `field`.

    Neither it nor a file in it may be a link that leads out of `root`.
    """
    if not is_name(name):
        raise invalid_argument([Violation(field, f"{shortened(name)!r} {NAME_RULE}")])
    root = root.resolve()
    found = (root / name).resolve()
    if not found.is_dir():
        raise invalid_argument([Violation(field, f"there is no folder {name!r} in the server's directory")])
    for path in (found, *found.iterdir()):
        if not path.resolve().is_relative_to(root):
            raise invalid_argument(
                [Violation(field, f"{path.name!r} is a link that leads out of the server's directory")]
            )
    return found
