"""Which directory the baseline loads: the same one that the server's worker loads."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.figures import BenchError
from salver.model.checkpoint import resolve_checkpoint
from salver.model.errors import CheckpointError
from salver.server import config
from salver.server.catalog import CATALOG, CatalogError, fetch


def default_cache_dir() -> Path:
    """The server's: SALVER_CACHE_DIR, or its own choice."""
    chosen = os.environ.get("SALVER_CACHE_DIR")
    return Path(chosen) if chosen else config.default_cache_dir()


def checkpoint_of(model: str, dtype: str, cache_dir: Path) -> Path:
    """The Hugging Face directory behind MODEL (a catalog name, a directory, a GGUF file) for this dtype.

    By now the server has fetched and converted it, so this only looks it up. Raises BenchError.
    """
    try:
        source = str(fetch(model, cache_dir, offline=True)) if model in CATALOG else model
        return resolve_checkpoint(source, cache_dir, dtype)
    except (CatalogError, CheckpointError) as error:
        raise BenchError(str(error)) from error
