"""The file of `--config`: a TOML file with the server's flags, for a ConfigMap to hold.

model = "smollm2"
max-num-seqs = 64
kv-cache-memory = "4GiB"
offline = true
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import configargparse


def config_file_values(
    argv: Sequence[str],
    file: str | None,
    known: Mapping[str, str],
    parser: configargparse.ArgumentParser,
) -> dict[str, str]:
    """What the file of `--config` in `argv` (or else `file`) says, by environment variable.

    `known` are the environment variables of the flags. A file that cannot be read, and a key that
    is no flag, end the program as argparse does.
    """
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    alone.add_argument("--config")
    try:
        path = alone.parse_known_args(list(argv))[0].config or file
    except argparse.ArgumentError:  # without its FILE: the whole parser says so
        return {}
    if path is None:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(f"argument --config: {path}: cannot be read: {reason}")
    values = {}
    for key, value in content.items():
        variable = "SALVER_" + key.replace("-", "_").upper()
        if variable not in known:
            flags = [name.removeprefix("SALVER_").replace("_", "-").lower() for name in known]
            near = difflib.get_close_matches(key, flags, 1)
            hint = f"; is it {near[0]}?" if near else ""
            parser.error(f"argument --config: {path}: there is no flag --{key}{hint}")
        values[variable] = _as_word(value, key, path, parser)
    return values


def _as_word(value: Any, key: str, path: str, parser: configargparse.ArgumentParser) -> str:
    """As it would stand on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    parser.error(f"argument --config: {path}: {key} must be a text, a number, true or false")
    raise AssertionError  # parser.error does not return
