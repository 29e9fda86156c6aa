"""Checkpoints of the Hugging Face Hub: `salver serve org/name`.

A branch or a tag is pinned to its commit first, and said, so that all files are of one state. They are kept
in the cache directory under their commit; `--offline` takes what is there. A download that was cut goes on
where it stopped, in the next process too (huggingface_hub's own begins a file anew then), and is checked
against the hub's digest. Tokens and endpoints are those of huggingface_hub (HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from salver.model.digests import hash_file, remember_digest

PROGRESS_SECONDS = 5.0
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"))
# What a checkpoint is beside its weights; not pictures, other frameworks' weights, or code.
_OTHERS = (".json", ".txt", ".model", ".jinja")


class HubError(Exception):
    """A checkpoint cannot be had from the hub; the message says why and what to do."""


def is_hub_id(source: str) -> bool:
    """Whether it looks like `org/name`."""
    return _ID.fullmatch(source) is not None and not source.endswith((".gguf", ".safetensors"))


def fetch_from_hub(
    hub_id: str,
    revision: str | None,
    cache_dir: Path,
    offline: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """The directory of a checkpoint of the hub, downloaded where it is not in the cache. Raises HubError."""
    wanted = revision or "main"
    record = _record(cache_dir, hub_id, wanted)
    if offline:
        try:
            return Path(record.read_text(encoding="utf-8"))
        except OSError as error:
            raise HubError(
                f"{hub_id} at {wanted} is not in the cache ({cache_dir}) and --offline forbids fetching it: "
                "run `salver pull` once without --offline, or give the path of a checkpoint directory"
            ) from error
    # Loaded here: a start without a hub id need not.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=endpoint).model_info(hub_id, revision=wanted)
        files = _wanted_files(sibling.rfilename for sibling in info.siblings or ())
        if not files:
            raise HubError(f"{hub_id} at {wanted} holds no weights as safetensors or PyTorch files")
        commit = str(info.sha)
        on_progress(f"fetching {hub_id} at {commit} from the hub ({len(files)} files)")
        found = cache_dir / "hub" / hub_id / commit
        found.mkdir(parents=True, exist_ok=True)
        with found.with_name(f"{commit}.lock").open("w") as lock:
            fcntl.flock(
                lock, fcntl.LOCK_EX
            )  # pods that share a volume: the others find what the first fetched
            for file in files:
                if not (found / file).exists():
                    _download(hub_id, commit, file, found, cache_dir, on_progress)
        for name in {wanted, commit}:
            place = _record(cache_dir, hub_id, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(str(found.absolute()), encoding="utf-8")
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"the hub does not give {hub_id} at {wanted}: {reason} (a private or gated one wants HF_TOKEN)"
        ) from error
    except HubError:
        raise
    except OSError as error:
        raise HubError(f"{hub_id} cannot be kept in the cache directory {cache_dir}: {error}") from error
    except Exception as error:  # the library's network client raises its own
        raise HubError(
            f"{hub_id} cannot be fetched from the hub: {type(error).__name__}: {error}. Without a network, "
            "give a catalog name, a checkpoint directory, or --offline for what was fetched before"
        ) from error
    return found


def _download(
    hub_id: str,
    commit: str,
    name: str,
    directory: Path,
    cache_dir: Path,
    on_progress: Callable[[str], None],
) -> None:
    """A file of the hub, into its place once all of it is there and is what it should be.

    Raises HubError, OSError and what huggingface_hub does.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.file_download import http_get

    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(hub_id, name, revision=commit, endpoint=endpoint)
    metadata = get_hf_file_metadata(url, endpoint=endpoint)
    headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
    place = directory / name
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    with part.open("ab") as file:
        shown: Any = _Shown(file, f"{name}: {{}} of {metadata.size} bytes", on_progress)
        begun = file.tell()
        if begun:
            shown.tell_progress()
        http_get(
            url, shown, resume_size=begun, headers=headers, expected_size=metadata.size,
            displayed_filename=name,
        )  # fmt: skip
    if not _is_whole(part, metadata.etag):
        part.unlink()
        raise HubError(f"{name} of {hub_id} came damaged and was not kept: start again")
    part.rename(place)
    if len(metadata.etag or "") == 64:
        remember_digest(place, cache_dir, str(metadata.etag))


class _Shown:
    """A file being written, and words about it now and then: the library draws on terminals alone."""

    def __init__(self, file: BinaryIO, text: str, on_progress: Callable[[str], None]) -> None:
        self._file = file
        self._text = text
        self._on_progress = on_progress
        self._told = time.monotonic()

    def write(self, content: bytes) -> int:
        written = self._file.write(content)
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self.tell_progress()
        return written

    def tell_progress(self) -> None:
        self._told = time.monotonic()
        self._on_progress("  " + self._text.format(self._file.tell()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _is_whole(part: Path, etag: str | None) -> bool:
    """The hub's tag is the SHA-256 of a large file, and git's SHA-1 of a small one; others say nothing."""
    if etag is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return True
    if len(etag) == 64:
        return hash_file(part) == etag
    content = part.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == etag


def _wanted_files(names: Iterable[str]) -> list[str]:
    """Of the files of a repository those that are loaded; one kind of weights."""
    top = [name for name in names if "/" not in name or name.startswith(("1_", "2_", "3_"))]
    for kinds in _WEIGHTS:
        weights = [name for name in top if name.endswith(kinds)]
        if any(name.endswith(kinds[0]) for name in weights):
            indices = tuple(index for _, index in _WEIGHTS)
            others = [name for name in top if name.endswith(_OTHERS) and not name.endswith(indices)]
            return sorted({*weights, *others})
    return []


def _record(cache_dir: Path, hub_id: str, revision: str) -> Path:
    """Where it is noted which directory holds a revision: written once all of it is there."""
    return cache_dir / "hub" / "pulled" / hub_id / quote(revision, safe="")
