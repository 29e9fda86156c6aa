"""SHA-256 of files, remembered in the cache directory so that a large file is read once.

A remembered digest holds for a path with unchanged size, modification time and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

_CHUNK = 1 << 20


def file_digest(path: Path, cache_dir: Path) -> str:
    """The SHA-256 of `path` in hex: remembered, or computed and then remembered. Raises OSError."""
    remembered = _remembered(path, cache_dir)
    if remembered is not None:
        return remembered
    digest = hash_file(path)
    remember_digest(path, cache_dir, digest)
    return digest


def hash_file(path: Path) -> str:
    """The SHA-256 of the file's bytes in hex, read now. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remember_digest(path: Path, cache_dir: Path, digest: str) -> None:
    """Note that `path`, as it is now, has this SHA-256.

    A cache directory that cannot be written costs time at the next start, nothing else: no error.
    """
    note = _note(path, cache_dir)
    entry = {**_identity(path), "sha256": digest}
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=note.parent, prefix=".note-")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        Path(name).replace(note)
    except OSError:
        Path(name).unlink(missing_ok=True)


def _remembered(path: Path, cache_dir: Path) -> str | None:
    identity = _identity(path)
    try:
        entry = json.loads(_note(path, cache_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or any(entry.get(key) != value for key, value in identity.items()):
        return None
    digest = entry.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _note(path: Path, cache_dir: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_dir / "digests" / f"{name}.json"


def _identity(path: Path) -> dict[str, object]:
    stat = path.stat()
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }
