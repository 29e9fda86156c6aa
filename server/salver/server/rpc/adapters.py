"""The adapters of a server while it serves: which version a name stands for, and when one is freed.

A call keeps the version that it began with (`Call.adapter`). A version that was replaced or unloaded is
retired: no call gets it any more, and it is dropped in the worker when the last that has it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import grpc

from salver.server.engine.changes import (
    AdapterFacts,
    AdapterSource,
    Change,
    Changed,
    DropAdapter,
    LoadAdapter,
    Refusal,
)
from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import ChangeRefused, EngineUnavailable, RequestAborted
from salver.server.engine.pending_changes import next_ticket
from salver.server.engine.process import OutputSink
from salver.server.engine.request import EngineRequest, Ready
from salver.server.rpc.errors import ApiError, Violation, invalid_argument, shortened
from salver.server.rpc.served import Front, LoadedAdapter


class ChangingEngine(Protocol):
    """What is asked of the engine (EngineProcess, or a fake of it in tests)."""

    config: EngineConfig

    @property
    def restarts(self) -> int: ...
    def submit(self, request: EngineRequest, sink: OutputSink) -> None: ...
    def abort(self, request_id: int, sample_index: int | None = None) -> None: ...
    async def change(self, change: Change) -> Changed: ...
    def tell(self, change: Change) -> None: ...
    def requests_of_adapters(self) -> list[tuple[str, bool]]: ...


def first_adapters(
    named: Sequence[tuple[str, str]], facts: Sequence[AdapterFacts]
) -> tuple[LoadedAdapter, ...]:
    """What the first worker has loaded of `adapter_sources(named)`."""
    return tuple(
        LoadedAdapter(name, n, path, fact)
        for n, ((name, path), fact) in enumerate(zip(named, facts, strict=True), start=1)
    )


class Adapters:
    """Loads and unloads. On the loop of the front, from its start on."""

    def __init__(self, front: Front, limit: int) -> None:
        """At most `limit` are served at a time."""
        self._front = front
        self.limit = limit
        self._engine: ChangingEngine | None = None
        self._retired: dict[str, LoadedAdapter] = {}  # by key
        self._changing = asyncio.Lock()
        self._versions = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, engine: ChangingEngine) -> None:
        """What the front serves may change from now on."""
        self._engine = engine
        self._versions = itertools.count(len(self._front.model.adapters) + 1)
        self._remember()

    def __iter__(self) -> Iterator[tuple[LoadedAdapter, bool]]:
        """Each version that the worker has, by name and version; whether it is retired."""
        served, retired = self._front.model.adapters, list(self._retired.values())
        both = [*((adapter, False) for adapter in served), *((adapter, True) for adapter in retired)]
        return iter(sorted(both, key=lambda item: (item[0].name, item[0].version)))

    def versions(self) -> list[tuple[str, str, bool]]:
        """Of each, its key, its name and whether it is retired. Also for other threads."""
        if self._engine is None:
            return []
        return [(adapter.facts.key, adapter.name, retired) for adapter, retired in self]

    def requests(self) -> tuple[Counter[str], Counter[str]]:
        """How many requests the engine computes of each version, by key, and how many wait there. Also for
        other threads."""
        running, waiting = Counter[str](), Counter[str]()
        if self._engine is not None:
            for key, started in self._engine.requests_of_adapters():
                (running if started else waiting)[key] += 1
        return running, waiting

    async def load(self, name: str, directory: Path) -> tuple[LoadedAdapter, LoadedAdapter | None]:
        """Serves what is in the directory under the name: it, and what it came in the place of.

        The same one twice where that was there already, with the same files. Raises ApiError and
        EngineUnavailable; nothing is changed then.
        """
        async with self._changing:
            engine = self._serving_engine()
            before = self._named(name)
            self._check_room(name, before)
            version = next(self._versions)
            source = AdapterSource(f"{name}@{version}", str(directory))
            facts = await self._loaded(engine, source, directory)
            if before is not None and before.facts.digest == facts.digest:
                engine.tell(DropAdapter(next_ticket(), source.key))
                return before, before
            made = LoadedAdapter(name, version, str(directory), facts)
            others = tuple(other for other in self._front.model.adapters if other.name != name)
            self._serve_adapters((*others, made), before)
            return made, before

    async def unload(self, name: str, abort: bool) -> tuple[LoadedAdapter, int]:
        """Serves it no more, at once, and returns when the last call of it has ended. It, and how many
        calls were aborted. Raises ApiError (NOT_FOUND)."""
        async with self._changing:
            adapter = self._named(name)
            if adapter is None:
                told = f"adapter {shortened(name)!r} is not served here"
                raise ApiError(grpc.StatusCode.NOT_FOUND, told, reason="MODEL_NOT_FOUND")
            self._serve_adapters(tuple(a for a in self._front.model.adapters if a is not adapter), adapter)
        calls = self._front.calls(adapter.facts.key)
        if abort:
            self._front.doom(calls, RequestAborted(f"adapter {name!r} was unloaded", "ADAPTER_UNLOADED"))
        await self._front.wait_for_end(calls)
        return adapter, len(calls) if abort else 0

    def restarted(self, ready: Ready) -> list[tuple[LoadedAdapter, str]]:
        """A new worker has come up. What it could not load again is served no more: it, and why."""
        reasons = dict(ready.lost_adapters)
        lost = [(adapter, reasons[key]) for adapter, _ in self if (key := adapter.facts.key) in reasons]
        gone = {adapter.facts.key for adapter, _ in lost}
        for key in gone & self._retired.keys():
            del self._retired[key]
        model = self._front.model
        kept = tuple(adapter for adapter in model.adapters if adapter.facts.key not in gone)
        if kept != model.adapters:
            self._serve_adapters(kept, None)
        known = {adapter.facts.key for adapter, _ in self}
        for facts in ready.adapters:  # retired and dropped while it loaded
            if facts.key not in known:
                self._drop(facts.key)
        return lost

    def _serve_adapters(self, adapters: tuple[LoadedAdapter, ...], retired: LoadedAdapter | None) -> None:
        self._front.serve(replace(self._front.model, adapters=adapters), self._front.engine)
        if retired is not None:
            self._retired[retired.facts.key] = retired
            task = asyncio.create_task(self._free(retired.facts.key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._remember()

    async def _free(self, key: str) -> None:
        """Drops a retired one when its last call has ended."""
        await self._front.wait_for_end(self._front.calls(key))
        if self._retired.pop(key, None) is not None:
            self._remember()
            self._drop(key)

    def _drop(self, key: str) -> None:
        try:
            self._serving_engine().tell(DropAdapter(next_ticket(), key))
        except EngineUnavailable:
            pass  # the next worker does not load it, or `restarted` finds it there

    def _remember(self) -> None:
        """What a next worker loads."""
        engine = self._serving_engine()
        sources = [
            AdapterSource(adapter.facts.key, adapter.directory, adapter.facts.digest) for adapter, _ in self
        ]
        engine.config = replace(engine.config, adapters=tuple(sources))

    async def _loaded(self, engine: ChangingEngine, source: AdapterSource, directory: Path) -> AdapterFacts:
        try:
            changed = await engine.change(LoadAdapter(next_ticket(), source))
        except asyncio.CancelledError:
            self._drop(source.key)  # comes after it, and undoes it
            raise
        except ChangeRefused as error:
            raise refused(error, directory) from error
        assert changed.adapter is not None
        return changed.adapter

    def _check_room(self, name: str, before: LoadedAdapter | None) -> None:
        """Raises ApiError (RESOURCE_EXHAUSTED). As many old versions may be finished beside those served."""
        num_served, num_retired = len(self._front.model.adapters), len(self._retired)
        if before is None and num_served >= self.limit:
            what = f"{num_served} adapters are served, and --max-adapters is {self.limit}: unload one"
        elif num_retired >= self.limit:
            what = f"{num_retired} retired versions have calls that run, and --max-adapters is {self.limit}"
        else:
            return
        raise ApiError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"no room for {name!r}: {what}",
            reason="TOO_MANY_ADAPTERS",
            metadata={"served": str(num_served), "retired": str(num_retired), "limit": str(self.limit)},
        )

    def _named(self, name: str) -> LoadedAdapter | None:
        return next((adapter for adapter in self._front.model.adapters if adapter.name == name), None)

    def _serving_engine(self) -> ChangingEngine:
        if self._engine is None:
            raise EngineUnavailable("the engine is starting")
        return self._engine


def refused(error: ChangeRefused, directory: Path) -> ApiError | ChangeRefused:
    """What is told of it: paths from the folder on."""
    if error.refusal is Refusal.INVALID:
        told = str(error).replace(f"{directory.parent}/", "")
        return invalid_argument([Violation("directory", told)])
    if error.refusal is Refusal.UNSUPPORTED:
        told = f"what this server computes cannot be changed while it runs: {error}"
        return ApiError(grpc.StatusCode.FAILED_PRECONDITION, told, reason="NOT_SUPPORTED")
    if error.refusal is Refusal.MEMORY:
        return ApiError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"the memory is too small: {error}", reason="OUT_OF_MEMORY"
        )
    return error
