"""Checkpoints by their hub id, from a made-up hub on a real port."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from salver.server.config import parse_config
from salver.server.hub import HubError, fetch_from_hub, is_hub_id
from salver.server.loading import StartError, find_checkpoint

COMMIT = "a" * 40


class Hub:
    """Serves the files of one directory as `acme/tiny`; counts downloads by file.

    The download of a file in `cut` breaks off after so many bytes, and is refused when it is tried again.
    """

    def __init__(self, directory: Path) -> None:
        self.downloads: list[str] = []
        self.cut: dict[str, int] = {}
        self.refused: set[str] = set()
        self.ranges: list[str] = []
        self.files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
        self.files |= {"tf_model.h5": b"no", "README.md": b"no", "pytorch_model.bin": b"no"}
        hub = self

        class Answer(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, call: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = call.path.partition("?")[0]
        content, headers, status = b"", {}, 200
        if path in (f"/api/models/acme/tiny/revision/{r}" for r in ("main", COMMIT)):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/acme/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            content = json.dumps(tree).encode()
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            content = self.files[name]
            tag = hashlib.sha256(content).hexdigest()
            if name == "config.json":  # as of small files, which git keeps
                tag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
            if body and name in self.refused:
                status, content = 403, b""
            elif body:
                self.downloads.append(name)
                content, status = self.part(call, content, headers)
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        call.send_response(status)
        for key, value in headers.items():
            call.send_header(key, value)
        call.send_header("Content-Length", str(len(content)))
        call.end_headers()
        if body:
            name = path.rpartition("/")[2]
            cut = self.cut.pop(name, None)
            call.wfile.write(content[:cut])
            if cut is not None:
                self.refused.add(name)
                call.close_connection = True

    def part(
        self, call: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str]
    ) -> tuple[bytes, int]:
        """What of a file was asked for, and the status to say it with."""
        wanted = call.headers.get("Range")
        if wanted is None:
            return content, 200
        self.ranges.append(wanted)
        first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return content[first:], 206


@pytest.fixture
def hub(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub(tiny_llama)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_looks_like_a_hub_id() -> None:
    for source in ("org/name", "HuggingFaceTB/SmolLM2-135M", "a/b.c"):
        assert is_hub_id(source)
    for source in ("smollm2", "./a/b", "/a/b", "a/b/c", "../b", "a/model.gguf", "a/", "~/b"):
        assert not is_hub_id(source)


def test_a_checkpoint_is_pinned_fetched_once_and_found_offline(
    hub: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    first = fetch_from_hub("acme/tiny", None, tmp_path, on_progress=said.append)
    assert COMMIT in said[0] and COMMIT in str(first)
    assert {p.name for p in first.iterdir()} == {p.name for p in tiny_llama.iterdir()}
    assert sorted(hub.downloads) == sorted(p.name for p in tiny_llama.iterdir())
    fetch_from_hub("acme/tiny", COMMIT, tmp_path)
    assert len(hub.downloads) == len(list(tiny_llama.iterdir()))
    hub.server.shutdown()
    for revision in (None, COMMIT):
        assert fetch_from_hub("acme/tiny", revision, tmp_path, offline=True) == first
    with pytest.raises(HubError, match="--offline forbids fetching"):
        fetch_from_hub("acme/tiny", "other", tmp_path, offline=True)


def test_a_download_that_was_cut_goes_on(
    hub: Hub, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process too: all that is known of it is on the disk. And its progress is shown."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("salver.server.hub.PROGRESS_SECONDS", 0.0)
    weights, said = tiny_llama / "model.safetensors", list[str]()
    size = weights.stat().st_size
    half = size // 2 // 1024 * 1024
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is written at a time
    hub.cut[weights.name] = half
    with pytest.raises(HubError, match="403"):
        fetch_from_hub("acme/tiny", None, tmp_path, on_progress=said.append)
    assert f"  {weights.name}: {half} of {size} bytes" in said
    with pytest.raises(HubError, match="not in the cache"):
        fetch_from_hub("acme/tiny", None, tmp_path, offline=True)
    hub.refused.clear()
    before = len(hub.downloads)
    said.clear()
    found = fetch_from_hub("acme/tiny", None, tmp_path, on_progress=said.append)
    assert hub.ranges[-1] == f"bytes={half}-"
    shown = [line for line in said if weights.name in line]
    assert [shown[0], shown[-1]] == [f"  {weights.name}: {done} of {size} bytes" for done in (half, size)]
    assert weights.name in hub.downloads[before:] and "config.json" not in hub.downloads[before:]
    for file in tiny_llama.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_part_is_not_kept(hub: Hub, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "hub" / "acme" / "tiny" / COMMIT
    place.mkdir(parents=True)
    (place / f"{name}.part").write_bytes(b"?" * 10)
    with pytest.raises(HubError, match=f"{name} of acme/tiny came damaged"):
        fetch_from_hub("acme/tiny", None, tmp_path)
    found = fetch_from_hub("acme/tiny", None, tmp_path)
    assert (found / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_a_server_finds_its_checkpoint(hub: Hub, tmp_path: Path) -> None:
    config = parse_config(["acme/tiny", "--cache-dir", str(tmp_path)], {})
    checkpoint, digest = find_checkpoint(config)
    assert (checkpoint / "config.json").exists() and digest
    with pytest.raises(StartError, match="acme/other"):
        find_checkpoint(parse_config(["acme/other", "--cache-dir", str(tmp_path)], {}))
    on_disk = parse_config([str(checkpoint), "--revision", "v1", "--cache-dir", str(tmp_path)], {})
    with pytest.raises(StartError, match="--revision v1"):
        find_checkpoint(on_disk)


def test_no_network_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="Without a network, give"):
        fetch_from_hub("acme/tiny", None, tmp_path)
