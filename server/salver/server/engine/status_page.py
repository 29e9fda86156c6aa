"""A page of shared memory with the worker's counters, read by the front at no cost to either.

Every field is eight aligned bytes, written by one process (the worker) and read by the
other; such loads and stores are not torn. Fields are independent: a reader may see one
from before a step and its neighbour from after it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
import weakref

_FIELDS = (
    "progress",
    "updated",
    "num_running",
    "num_waiting",
    "kv_blocks_used",
    "kv_blocks_total",
    "preemptions",
    "prefix_queries",
    "prefix_hits",
    "steps",
    "generated_tokens",
    "draft_tokens",
    "accepted_draft_tokens",
    "gpu_memory_used",
    "gpu_memory_total",
    "gpu_utilization",
)
_COUNTERS = (
    "preemptions", "prefix_queries", "prefix_hits", "steps", "generated_tokens", "draft_tokens",
    "accepted_draft_tokens",
)  # fmt: skip
_GAUGES = (
    "num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total", "gpu_memory_used",
    "gpu_memory_total", "gpu_utilization",
)  # fmt: skip
_SIZE = mmap.PAGESIZE


class _Count:
    """An unsigned 64-bit field of the page."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._index = _FIELDS.index(name)

    def __get__(self, page: StatusPage, owner: type) -> int:
        return page._counts[self._index] + page._earlier[self._index]

    def __set__(self, page: StatusPage, value: int) -> None:
        page._counts[self._index] = value


class _Seconds:
    """A 64-bit float field of the page."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._index = _FIELDS.index(name)

    def __get__(self, page: StatusPage, owner: type) -> float:
        return page._seconds[self._index]

    def __set__(self, page: StatusPage, value: float) -> None:
        page._seconds[self._index] = value


class StatusPage:
    """The page, mapped into this process. The front creates it, the worker attaches to its descriptor.

    One page outlives the workers. A worker writes its own counts from zero; `retire_worker`
    lets the front add those of its predecessors, so that counters only ever grow.
    """

    progress = _Count()  # bumped per layer and by idle ticks; standing still means stalled
    updated = _Seconds()  # monotonic clock at the last bump
    num_running = _Count()
    num_waiting = _Count()
    kv_blocks_used = _Count()
    kv_blocks_total = _Count()
    preemptions = _Count()
    prefix_queries = _Count()  # prompt tokens looked up in the prefix cache
    prefix_hits = _Count()  # of them, found
    steps = _Count()
    generated_tokens = _Count()
    draft_tokens = _Count()  # guesses at next tokens that steps checked
    accepted_draft_tokens = _Count()  # of them, right
    gpu_memory_used = _Count()  # bytes, by all processes
    gpu_memory_total = _Count()  # 0 without a GPU
    gpu_utilization = _Count()  # 1 + percent of the last second or so in which it computed; 0: not known

    def __init__(self, fd: int) -> None:
        """Maps `fd` and owns it from now on."""
        self.fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._map = mmap.mmap(fd, _SIZE)
        self._bytes = memoryview(self._map)
        # Native casts, so that an item is stored by one eight-byte copy.
        self._counts = self._bytes.cast("Q")
        self._seconds = self._bytes.cast("d")
        self._earlier = [0] * len(_FIELDS)  # this process's own: counts of workers that ended

    @classmethod
    def create(cls) -> StatusPage:
        """A new page, all zeros."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("salver-status")
        else:  # not Linux: an unlinked file does the same
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    @classmethod
    def attach(cls, fd: int) -> StatusPage:
        """The page behind an inherited descriptor."""
        return cls(fd)

    def bump(self) -> None:
        """Says that the worker is alive. Cheap: called for every layer."""
        self._counts[0] += 1
        self._seconds[1] = time.monotonic()

    def retire_worker(self) -> None:
        """Called by the front when its worker has ended: keeps its counts, zeroes its gauges."""
        for name in _COUNTERS:
            index = _FIELDS.index(name)
            self._earlier[index] += self._counts[index]
            self._counts[index] = 0
        for name in _GAUGES:
            self._counts[_FIELDS.index(name)] = 0

    def close(self) -> None:
        """Unmaps the page and closes the descriptor. May be called twice."""
        if not self._close_fd.alive:
            return
        self._counts.release()
        self._seconds.release()
        self._bytes.release()
        self._map.close()
        self._close_fd()
