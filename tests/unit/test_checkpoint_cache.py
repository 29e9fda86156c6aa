"""Conversions and digests are made once, whole or not at all, and remade where they are damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from salver.model import checkpoint, digests
from salver.model.checkpoint import resolve_checkpoint, weights_digest
from salver.model.errors import CheckpointError

# Stands for `python -m salver.model.gguf`: the same arguments, files and manners.
CONVERTER = """
import hashlib, json, pathlib, sys
source, destination, _, dtype = sys.argv[1:]
content = pathlib.Path(source).read_bytes()
if b"broken" in content:
    print(source + ": tensor x is missing", file=sys.stderr)
    sys.exit(1)
if b"crash" in content:
    raise RuntimeError("a bug")
print("converting", flush=True)
if b"wait" in content:
    sys.stdin = open(source + ".go")  # a pipe: returns when somebody opens it for writing
    sys.stdin.read()
directory = pathlib.Path(destination)
files = {}
for name, text in (("config.json", b"{}"), ("model.safetensors", content + dtype.encode())):
    (directory / name).write_bytes(text)
    files[name] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
(directory / "manifest.json").write_text(json.dumps({"files": files}))
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the converter; the list has the command of each of its runs."""
    script = tmp_path / "converter.py"
    script.write_text(CONVERTER)
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[:3] == [sys.executable, "-m", "salver.model.gguf"]
        commands.append(command)
        return popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(checkpoint.subprocess, "Popen", start)
    return commands


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF one")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_directory_stays_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path), cache, "bfloat16") == tmp_path
    assert not cache.exists()


def test_converted_once_per_dtype(source: Path, cache: Path, runs: list[list[str]]) -> None:
    lines: list[str] = []
    first = resolve_checkpoint(str(source), cache, "float32", lines.append)
    assert (first / "model.safetensors").read_bytes() == b"GGUF onefloat32"
    assert lines == ["converting"]
    assert resolve_checkpoint(str(source), cache, "float32") == first
    assert resolve_checkpoint(str(source), cache, "auto") == first
    assert len(runs) == 1
    second = resolve_checkpoint(str(source), cache, "bfloat16")
    assert second != first and (second / "model.safetensors").read_bytes() == b"GGUF onebfloat16"
    source.write_bytes(b"GGUF two")
    assert resolve_checkpoint(str(source), cache, "float32") not in (first, second)
    assert len(runs) == 3
    assert not list((cache / "converted").glob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_conversion_is_remade(
    source: Path, cache: Path, runs: list[list[str]], damage: str
) -> None:
    directory = resolve_checkpoint(str(source), cache, "float32")
    weights = directory / "model.safetensors"
    if damage == "truncate":
        os.truncate(weights, 3)
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (directory / "manifest.json").write_text('{"files": [')
    else:
        (directory / "manifest.json").unlink()
    lines: list[str] = []
    assert resolve_checkpoint(str(source), cache, "float32", lines.append) == directory
    assert weights.read_bytes() == b"GGUF onefloat32"
    assert len(runs) == 2 and "incomplete" in lines[0]


def test_leftovers_of_killed_conversions_go(source: Path, cache: Path, runs: list[list[str]]) -> None:
    directory = resolve_checkpoint(str(source), cache, "float32")
    other = cache / "converted" / "0123456789abcdef-float32-v1.tmp-abc"
    own = directory.with_name(directory.name + ".tmp-abc")
    for path in (own, other):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    shutil.rmtree(directory)
    resolve_checkpoint(str(source), cache, "float32")
    assert not own.exists() and not other.exists()


def test_two_at_once_convert_once(source: Path, cache: Path, runs: list[list[str]]) -> None:
    source.write_bytes(b"GGUF wait")
    gate = Path(f"{source}.go")
    os.mkfifo(gate)
    converting, waiting = threading.Event(), threading.Event()
    found: list[Path] = []
    first = threading.Thread(
        target=lambda: found.append(resolve_checkpoint(source, cache, "float32", lambda _: converting.set()))
    )
    second = threading.Thread(
        target=lambda: found.append(resolve_checkpoint(source, cache, "float32", lambda _: waiting.set()))
    )
    first.start()
    assert converting.wait(60)
    second.start()
    assert waiting.wait(60)  # "another process is working on ..."
    gate.write_text("go")
    first.join(60)
    second.join(60)
    assert len(found) == 2 and found[0] == found[1]
    assert len(runs) == 1


def test_what_the_converter_says_is_said(source: Path, cache: Path, runs: list[list[str]]) -> None:
    source.write_bytes(b"GGUF broken")
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(source), cache, "float32")
    assert str(caught.value) == f"{source}: tensor x is missing"
    source.write_bytes(b"GGUF crash")
    with pytest.raises(CheckpointError, match="a bug"):
        resolve_checkpoint(str(source), cache, "float32")
    assert [path.suffix for path in (cache / "converted").iterdir()] == [".lock", ".lock"]


def test_unusable_sources_are_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such file or directory"):
        resolve_checkpoint(str(tmp_path / "nowhere"), cache)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_checkpoint(str(tmp_path), cache)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="neither a checkpoint directory nor a GGUF file"):
        resolve_checkpoint(str(tmp_path / "text"), cache)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="dtype 'int8'"):
        resolve_checkpoint(str(tmp_path / "m.gguf"), cache, "int8")


def test_a_full_disk_is_said(
    source: Path, cache: Path, runs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.tempfile, "mkdtemp", full)
    with pytest.raises(CheckpointError, match="no space left on the disk under"):
        resolve_checkpoint(str(source), cache, "float32")


def test_weights_are_hashed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"1")
    (tmp_path / "model-2.safetensors").write_bytes(b"2")
    (tmp_path / "pytorch_model.bin").write_bytes(b"ignored beside safetensors")
    hashed: list[str] = []
    real = digests.hash_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(digests, "hash_file", counted)
    digest = weights_digest(tmp_path, cache)
    assert weights_digest(tmp_path, cache) == digest
    assert hashed == ["model-1.safetensors", "model-2.safetensors"]
    replacement = tmp_path / "new"
    replacement.write_bytes(b"3")
    stat = (tmp_path / "model-1.safetensors").stat()
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replacement.rename(tmp_path / "model-1.safetensors")  # same size and time, another file
    assert weights_digest(tmp_path, cache) != digest
    assert weights_digest(tmp_path, tmp_path / "other cache") == weights_digest(tmp_path, cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        weights_digest(tmp_path / "empty", cache)


def test_a_damaged_note_is_ignored(source: Path, cache: Path) -> None:
    digest = digests.file_digest(source, cache)
    (note,) = (cache / "digests").iterdir()
    for text in ("{", "[]", json.dumps({**json.loads(note.read_text()), "sha256": 5})):
        note.write_text(text)
        assert digests.file_digest(source, cache) == digest
