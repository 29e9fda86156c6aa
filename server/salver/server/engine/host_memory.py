"""Memory of the host: how much is free, for what would rather be refused than end the process; and what is
freed between steps is kept, as the next step wants as much.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

# Of glibc's mallopt(3). A step's tensors are a few tens of megabytes each.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT = 512 * 1024**2, 256 * 1024**2
_OLD_LARGEST = 32 * 1024**2  # that a glibc before 2.35 takes

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def keep_freed_memory() -> bool:
    """Keeps up to half a gigabyte that is freed, where the C library is glibc. Whether it does.

    Otherwise every tensor of several megabytes is mapped anew, page by page: that was a tenth of a step of
    32 sequences. To be called when all that stays is there, so that nothing large ends up between small.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    return bool(
        kept and (mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_M_MMAP_THRESHOLD, _OLD_LARGEST))
    )


def free_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Of the machine, or of the container (control groups, version 2) if it has less; None: not known."""
    found = [size for size in (_of_machine(meminfo), _of_group(cgroup)) if size is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    kibibytes = _numbers(meminfo).get("MemAvailable:")
    return None if kibibytes is None else 1024 * kibibytes


def _of_group(cgroup: Path) -> int | None:
    """The limit less what is used; pages of files that nobody uses make room."""
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + _numbers(cgroup / "memory.stat").get("inactive_file", 0))


def _numbers(file: Path) -> dict[str, int]:
    """Of a file of lines with a name and a number."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
