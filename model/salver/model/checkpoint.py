"""From what the user named to a checkpoint directory: GGUF files are converted once and kept.

No torch, and no `gguf` either: the conversion runs in a process of its own
(`salver.model.gguf`). A cached conversion lies under `CACHE/converted/KEY`, the key made of
the source's digest, the dtype and the converter's version; it appears by one rename, under a lock.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .digests import file_digest, remember_digest
from .errors import CheckpointError

CONVERTER_VERSION = 1  # raise it when what gguf.py or gguf_tokenizer.py writes changes
MANIFEST = "manifest.json"  # written last by gguf.py: {"files": {name: {"size", "sha256"}}}
DTYPES = ("float32", "bfloat16", "float16")

Progress = Callable[[str], None]


def resolve_checkpoint(
    source: str | Path, cache_dir: Path, dtype: str = "auto", on_progress: Progress | None = None
) -> Path:
    """The checkpoint directory for `source`: a directory as it is, a GGUF file converted to `dtype`.

    `dtype` is float32, bfloat16, float16 or auto, which converts to float32: it loses nothing and
    whoever loads it can round. `on_progress` gets a line of text now and then.
    Raises CheckpointError, naming the path and what is wrong.
    """
    progress = on_progress or (lambda _: None)
    path = Path(source)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise CheckpointError(f"{path}: this directory has no config.json")
            return path
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file or directory")
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: neither a checkpoint directory nor a GGUF file")
        return _converted(path, cache_dir, "float32" if dtype == "auto" else dtype, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left on the disk under {cache_dir}; free some or choose another cache directory"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES) and Path(str(error.filename)).is_relative_to(cache_dir):
            raise CheckpointError(
                f"{error.filename}: cannot write in the cache directory: {error.strerror}; choose another one"
            ) from error
        raise CheckpointError(f"{path}: {error}") from error


def weights_digest(checkpoint: Path, cache_dir: Path) -> str:
    """SHA-256 in hex over the names and digests of the weight files of the directory `checkpoint`.

    Computed once per file (see `salver.model.digests`). Raises CheckpointError where there are none.
    """
    try:
        names = sorted(p for p in checkpoint.iterdir() if p.suffix == ".safetensors")
        names = names or sorted(p for p in checkpoint.iterdir() if p.suffix == ".bin")
        names = names or sorted((*checkpoint.glob("*.onnx"), *checkpoint.glob("onnx/*.onnx")))
        if not names:
            raise CheckpointError(f"{checkpoint}: no *.safetensors, *.bin and *.onnx file")
        digest = hashlib.sha256()
        for path in names:
            digest.update(f"{path.name} {file_digest(path, cache_dir)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return digest.hexdigest()


def _converted(source: Path, cache_dir: Path, dtype: str, progress: Progress) -> Path:
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: one of auto, {', '.join(DTYPES)} was expected")
    key = f"{file_digest(source, cache_dir)[:16]}-{dtype}-v{CONVERTER_VERSION}"
    root = cache_dir / "converted"
    target = root / key
    if _is_whole(target, cache_dir):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{key}.lock", progress) as lock:
        if _is_whole(target, cache_dir):  # by whoever held the lock
            return target
        _remove_leftovers(root, key)
        if target.exists():
            progress(f"the converted checkpoint {target} is incomplete or damaged; converting again")
            shutil.rmtree(target)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f"{key}.tmp-"))
        try:
            _convert(source, temporary, dtype, progress, lock)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(root)
    for name, entry in _manifest(target).items():
        remember_digest(target / name, cache_dir, str(entry["sha256"]))
    return target


def _convert(source: Path, destination: Path, dtype: str, progress: Progress, lock: int) -> None:
    """Run the converter; it holds the lock too, so that one left behind by a kill is waited for."""
    command = [sys.executable, "-m", "salver.model.gguf", str(source), str(destination), "--dtype", dtype]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            pass_fds=(lock,),
        ) as process,
    ):
        # This may run in a thread that a process does not wait for when it ends.
        atexit.register(process.kill)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                progress(line.rstrip("\n"))
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            atexit.unregister(process.kill)
        if status == 0:
            return
        errors.seek(0)
        message = errors.read().strip()
    if status == 1 and "\n" not in message and message:
        raise CheckpointError(message)
    ending = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    raise CheckpointError(f"{source}: its conversion {ending}\n{message}".rstrip())


def _manifest(directory: Path) -> dict[str, dict[str, object]]:
    """The files that a conversion wrote, by name; empty where the manifest is missing or damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return {str(name): dict(entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_whole(directory: Path, cache_dir: Path) -> bool:
    """Whether all files of a conversion are as written. One that was changed since is read to know it."""
    files = _manifest(directory)
    try:
        return bool(files) and all(
            (directory / name).stat().st_size == entry.get("size")
            and file_digest(directory / name, cache_dir) == entry.get("sha256")
            for name, entry in files.items()
        )
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path, progress: Progress | None = None) -> Iterator[int]:
    """Hold an exclusive lock on `path`, waiting for it; yields the descriptor that holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(f"another process is working on {path.stem}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path, own_key: str) -> None:
    """Remove the temporary directories of conversions that nobody is running any more."""
    for path in root.glob("*.tmp-*"):
        key = path.name.partition(".tmp-")[0]
        if key == own_key:
            shutil.rmtree(path, ignore_errors=True)
            continue
        descriptor = os.open(root / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
