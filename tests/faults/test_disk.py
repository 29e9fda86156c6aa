"""A disk that is full, slow, or gives back something else: said with its path, made anew, never served."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from e2e.test_start import failed_start
from grpc_health.v1 import health_pb2
from parity.test_gguf import write_gguf
from support import calls
from support.serving import Server, wait_until
from unit.test_catalog import entry, write_wheel

from salver.model.checkpoint import resolve_checkpoint, weights_digest
from salver.model.kernels import build
from salver.server.catalog import CatalogError, fetch

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
TORCH = ("--kernels", "torch")  # compiles nothing into a cache directory that is new


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 KB, cleared away with the test."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount")
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


def flip(path: Path) -> None:
    """One bit, in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- full ----


def test_a_full_disk_at_conversion(small_disk: Path, gguf: Path, start_server: Callable[..., Server]) -> None:
    said = failed_start(gguf, *TORCH, cache_dir=small_disk)
    assert "no space left on the disk" in said and str(small_disk) in said
    assert "choose another cache directory" in said
    assert not list((small_disk / "converted").glob("*.tmp-*")), "half a conversion fills it for good"
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    server = start_server(gguf, "--cache-dir", str(small_disk), *TORCH)
    assert len(server.tokens([5, 6, 7], max_tokens=3, ignore_eos=True)) == 3


def test_a_disk_that_is_full_from_the_start(
    small_disk: Path, gguf: Path, tiny_llama: Path, start_server: Callable[..., Server]
) -> None:
    """What must be kept there is refused; a checkpoint directory needs nothing kept."""
    with (small_disk / "others").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    said = failed_start(gguf, *TORCH, cache_dir=small_disk)
    assert "no space left on the disk" in said and str(small_disk) in said
    server = start_server(tiny_llama, "--cache-dir", str(small_disk), *TORCH)
    assert server.tokens("a", max_tokens=1)


def test_a_full_disk_at_a_download(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(300_000)
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    tiny = entry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    with pytest.raises(CatalogError, match=f"no space left on the disk under {small_disk}.*--cache-dir"):
        fetch("tiny", small_disk, catalog={"tiny": tiny})
    assert not list(small_disk.rglob("tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=5m", str(small_disk)], check=True)
    assert fetch("tiny", small_disk, catalog={"tiny": tiny}).read_bytes() == content


# ---- damaged ----


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["a bit", "a part"])
def test_a_damaged_conversion_is_made_anew(gguf: Path, tmp_path: Path, name: str, damage: str) -> None:
    cache, lines = tmp_path / "cache", list[str]()
    directory = resolve_checkpoint(gguf, cache, "float32")
    whole, digest = (directory / name).read_bytes(), weights_digest(directory, cache)
    if damage == "a bit":
        flip(directory / name)
    else:
        os.truncate(directory / name, len(whole) // 2)
    assert resolve_checkpoint(gguf, cache, "float32", lines.append) == directory
    assert (directory / name).read_bytes() == whole
    assert weights_digest(directory, cache) == digest
    assert str(directory) in lines[0] and "damaged" in lines[0]
    assert resolve_checkpoint(gguf, cache, "float32", lines.append) == directory
    assert sum("damaged" in line for line in lines) == 1


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes 100 KB, and a line into its log each time."""
    script = tmp_path / "compiler"
    script.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\n"
        f"echo compiled >> {tmp_path}/log\nhead -c 100000 {tmp_path}/noise > $1\n"
    )
    script.chmod(0o755)
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(100_000))
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "check_processor", lambda: None)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "none")
    return tmp_path / "log"


@pytest.mark.parametrize("damage", ["a bit", "a part", "all"])
def test_a_damaged_kernel_is_compiled_anew(compiler: Path, tmp_path: Path, damage: str) -> None:
    cache, lines = tmp_path / "cache", list[str]()
    path = build.find_or_build(cache)
    assert build.find_or_build(cache) == path
    whole = path.read_bytes()
    assert compiler.read_text().split() == ["compiled"]
    if damage == "a bit":
        flip(path)
    else:
        os.truncate(path, 0 if damage == "all" else 5000)
    assert build.find_or_build(cache, lines.append) == path
    assert path.read_bytes() == whole
    assert any(f"{path} is damaged" in line for line in lines)


def test_a_full_disk_at_compilation(compiler: Path, small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(150_000))
    with pytest.raises(build.KernelUnavailable, match="No space left on device"):
        build.find_or_build(small_disk)
    assert not list((small_disk / "kernels").glob("*.part"))
    (small_disk / "others").unlink()
    assert build.find_or_build(small_disk).stat().st_size == 100_000


# ---- slow ----


def converter_of(server: Server) -> psutil.Process:
    def find() -> psutil.Process | None:
        for child in psutil.Process(server.process.pid).children(recursive=True):
            try:
                if "salver.model.gguf" in child.cmdline():
                    return child
            except psutil.NoSuchProcess:
                continue
        return None

    found = wait_until("the conversion", find, pause=0.001)
    assert found is not None
    return found


@pytest.fixture
def slow_start(gguf: Path, tmp_path: Path) -> Iterator[Server]:
    """A server whose conversion stands still, as if the disk did."""
    server = Server(str(gguf), "--dtype", "float32", "--cache-dir", str(tmp_path / "slow"), *TORCH)
    try:
        converter_of(server).suspend()
        yield server
        assert "Traceback" not in server.log, server.log
    finally:
        server.kill()


def test_a_slow_disk_holds_up_no_answer(slow_start: Server) -> None:
    for _ in range(20):
        assert slow_start.health_of() == NOT_SERVING
        assert slow_start.health_of("liveness") == SERVING
    failure = calls.failure_of(lambda: slow_start.generate([5], max_tokens=1))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
    assert failure.retry_after and failure.pushback_ms
    converter_of(slow_start).resume()
    slow_start.wait_serving()
    assert slow_start.tokens([5], max_tokens=1)
    assert slow_start.stop() == 0


def test_a_slow_disk_holds_up_no_end(slow_start: Server, gguf: Path, tmp_path: Path) -> None:
    """And what it was doing ends with it: nobody waits for a lock that is held for nothing."""
    converter = converter_of(slow_start)
    assert slow_start.stop(signal.SIGTERM, timeout=20) == 0
    assert not converter.is_running() or converter.status() == psutil.STATUS_ZOMBIE
    assert resolve_checkpoint(gguf, tmp_path / "slow", "float32").is_dir()
    assert not list((tmp_path / "slow" / "converted").glob("*.tmp-*"))
