"""Checkpoints of the Hugging Face Hub: `salver serve org/name`.

A branch or a tag is pinned to its commit first, and said, so that all files are of one state. Downloads
resume where they were cut, and are kept in the cache directory under their commit; `--offline` takes what
is there. Tokens and endpoints are those of huggingface_hub (HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

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
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=endpoint).model_info(hub_id, revision=wanted)
        files = _wanted_files(sibling.rfilename for sibling in info.siblings or ())
        if not files:
            raise HubError(f"{hub_id} at {wanted} holds no weights as safetensors or PyTorch files")
        on_progress(f"fetching {hub_id} at {info.sha} from the hub ({len(files)} files)")
        found = snapshot_download(
            hub_id, revision=info.sha, cache_dir=cache_dir / "hub", allow_patterns=files, endpoint=endpoint
        )
        for name in {wanted, str(info.sha)}:
            place = _record(cache_dir, hub_id, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(str(Path(found).absolute()), encoding="utf-8")
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"the hub does not give {hub_id} at {wanted}: {reason} (a private or gated one wants HF_TOKEN)"
        ) from error
    except HubError:
        raise
    except Exception as error:  # the library's network client raises its own
        raise HubError(
            f"{hub_id} cannot be fetched from the hub: {type(error).__name__}: {error}. Without a network, "
            "give a catalog name, a checkpoint directory, or --offline for what was fetched before"
        ) from error
    return Path(found)


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
