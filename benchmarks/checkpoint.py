"""Which directory the baseline loads: the same one that the server's worker loads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import BenchError
from salver.model.checkpoint import resolve_checkpoint
from salver.model.errors import CheckpointError
from salver.server.catalog import CATALOG, CatalogError, default_cache_dir, fetch

__all__ = ["checkpoint_of", "default_cache_dir", "source_of"]


def checkpoint_of(model: str, dtype: str, cache_dir: Path) -> Path:
    """The Hugging Face directory behind MODEL (a catalog name, a directory, a GGUF file) for this dtype.

    By now the server has fetched and converted it, so this only looks it up. Raises BenchError.
    """
    try:
        source = fetch(model, cache_dir, offline=True) if model in CATALOG else model
        return resolve_checkpoint(source, cache_dir, dtype)
    except (CatalogError, CheckpointError) as error:
        raise BenchError(str(error)) from error


def source_of(model: str, cache_dir: Path) -> Path | None:
    """The GGUF file that this checkpoint is made from, None when it is a directory. Raises BenchError."""
    try:
        source = Path(fetch(model, cache_dir, offline=True) if model in CATALOG else model)
    except CatalogError as error:
        raise BenchError(str(error)) from error
    return source if source.suffix == ".gguf" else None
