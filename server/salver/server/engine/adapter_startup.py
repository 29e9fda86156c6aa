"""The adapters that an engine begins with, and what the front is told of each."""

from __future__ import annotations

from pathlib import Path

from salver.model.adapters import Adapter, AdapterBase, load_adapter
from salver.model.encoder import Encoder
from salver.model.errors import CheckpointError
from salver.model.transformer import Transformer
from salver.server.engine.changes import AdapterFacts, AdapterSource
from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import StartError


def facts_of(key: str, adapter: Adapter) -> AdapterFacts:
    return AdapterFacts(key, adapter.digest, adapter.rank, adapter.num_bytes)


def load_adapters(
    config: EngineConfig, model: Transformer | Encoder
) -> tuple[dict[str, Adapter], tuple[tuple[str, str], ...]]:
    """The adapters, and keys of those that were there before and cannot be had again, with the reason.

    Raises StartError for a bad one that was never there.
    """
    loaded, lost = {}, []
    base = AdapterBase.of(model)
    for source in config.adapters:
        try:
            loaded[source.key] = read_adapter(source, base)
        except CheckpointError as error:
            if not source.digest:
                name = source.key.rpartition("@")[0]
                raise StartError(f"--adapter {name}: {error}") from error
            lost.append((source.key, str(error)))
    return loaded, tuple(lost)


def read_adapter(source: AdapterSource, model: object) -> Adapter:
    """Raises CheckpointError: also for other files than its digest is of."""
    adapter = load_adapter(Path(source.directory), model)
    if source.digest not in ("", adapter.digest):
        raise CheckpointError(f"{source.directory}: the files have changed since they were loaded")
    return adapter
