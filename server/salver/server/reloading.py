"""Files that may change while the server runs: certificates and tokens, rotated without a restart.

They are looked at when somebody asks, at most once a second. (Kubernetes replaces a mounted
Secret by moving a link, which shows in what `stat` says.) A new content that is not good is
logged and counted, and the last good one stays in force.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from salver.server.log import log_event

_log = logging.getLogger("salver.reloading")
_T = TypeVar("_T")

CHECK_SECONDS = 1.0
_Signature = tuple[tuple[int, int, int] | None, ...]


class BadFile(Exception):
    """A file cannot be used; the message names it and never quotes it."""


class Reloading(Generic[_T]):
    """What `load` makes of `paths`, as they are now. May be asked by several threads."""

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        load: Callable[[], _T],
        reloaded: Callable[[str, bool], None] = lambda what, good: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Loads them. `reloaded` is told of every later attempt: `what`, and whether it was good.

        Raises BadFile.
        """
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._reloaded = reloaded
        self._clock = clock
        self._lock = threading.Lock()
        self._signature = self._look()
        self._value = load()
        self._next_check = clock() + CHECK_SECONDS

    def current(self) -> _T:
        """The newest good content."""
        with self._lock:
            now = self._clock()
            if now >= self._next_check:
                self._next_check = now + CHECK_SECONDS
                self._check()
            return self._value

    def _look(self) -> _Signature:
        return tuple(_signature(path) for path in self._paths)

    def _check(self) -> None:
        signature = self._look()
        if signature == self._signature:
            return
        try:
            value = self._load()
        except BadFile as error:
            # Two files are not replaced in one moment: their second half is another change.
            self._signature = signature
            self._reloaded(self._what, False)
            log_event(_log, logging.ERROR, "not reloaded", what=self._what, reason=str(error))
            return
        if self._look() != signature:
            return  # it changed under our eyes; the next look reads it again
        self._signature, self._value = signature, value
        self._reloaded(self._what, True)
        log_event(_log, logging.INFO, "reloaded", what=self._what)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read(path: Path, flag: str) -> bytes:
    """The bytes of the file that `flag` names. Raises BadFile."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{flag} {path}: cannot be read: {error.strerror or error}") from error
