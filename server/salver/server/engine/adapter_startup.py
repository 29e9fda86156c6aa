"""The adapters that an engine begins with, and what the front is told of each."""

from __future__ import annotations

from pathlib import Path

from salver.model.adapters import Adapter, AdapterBase, files_of, load_adapter
from salver.model.encoder import Encoder
from salver.model.errors import CheckpointError
from salver.model.transformer import Transformer
from salver.server.engine.changes import AdapterFacts, AdapterSource
from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import StartError
from salver.server.engine.host_memory import free_bytes

_TIMES = 4  # as large as its file is an adapter of 16 bits: as floats, and again where they are computed


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
            loaded[source.key] = read_adapter(source, base, config.max_adapter_rank)
        except (CheckpointError, MemoryError) as error:
            if not source.digest:
                name = source.key.rpartition("@")[0]
                raise StartError(f"--adapter {name}: {error}") from error
            lost.append((source.key, str(error)))
    return loaded, tuple(lost)


def read_adapter(source: AdapterSource, model: object, max_rank: int | None = None) -> Adapter:
    """Raises CheckpointError, also for other files than its digest is of; MemoryError for more than is free,
    before it reads any of it.
    """
    directory = Path(source.directory)
    needed, free = _TIMES * sum(file.stat().st_size for file in files_of(directory)), free_bytes()
    if free is not None and needed > free:
        raise MemoryError(f"{directory}: it takes about {needed} bytes, and {free} are free")
    adapter = load_adapter(directory, model, max_rank)
    if source.digest not in ("", adapter.digest):
        raise CheckpointError(f"{source.directory}: the files have changed since they were loaded")
    return adapter
