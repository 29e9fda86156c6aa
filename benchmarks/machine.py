"""On what was measured, and with what. Standard library only."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("salver", "torch", "transformers", "grpcio", "protobuf")


def cpu_model() -> str:
    """The processor's name, with family and model number where Linux tells them (clouds hide the name)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(root: Path) -> str:
    """The checkout's short commit, `-dirty` when tracked files differ; `unknown` outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def header(root: Path) -> dict[str, object]:
    """Everything above, for the report and its JSON; and how busy the machine was before the start."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(root),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
