"""The base's weights replaced while the server runs: what becomes of calls, and which version is in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from salver.model.checkpoint import weights_digest
from salver.model.errors import CheckpointError
from salver.server.engine.changes import ApplyWeights, DropWeights, StageWeights
from salver.server.engine.errors import ChangeRefused, EngineError, EngineUnavailable, RequestAborted
from salver.server.engine.pending_changes import next_ticket
from salver.server.rpc.adapters import ChangingEngine, refused
from salver.server.rpc.errors import Violation, invalid_argument
from salver.server.rpc.served import Front

Mode = Literal["wait", "abort", "keep"]
RETRY_RESTARTED = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Update:
    """What an update did. `pause` is in seconds, that steps stood still for it."""

    version: int
    digest: str
    numerics_id: str
    num_aborted: int = 0
    num_kept: int = 0
    pause: float = 0.0
    unchanged: bool = False


class Weights:
    """Updates, one at a time. On the loop of the front."""

    def __init__(
        self,
        front: Front,
        cache_dir: Path,
        updated: Callable[[int, float], None] = lambda version, pause: None,
    ) -> None:
        """Digests of files are kept in `cache_dir`. `updated` is told each update's version and pause."""
        self._front = front
        self._cache_dir = cache_dir
        self._updated = updated
        self._changing = asyncio.Lock()
        self._engine: ChangingEngine | None = None

    def serve(self, engine: ChangingEngine) -> None:
        """What the front serves may change from now on."""
        self._engine = engine

    async def update(self, directory: Path, mode: Mode) -> Update:
        """Serves the weights of a checkpoint directory in the place of those that are served.

        They are read and checked as a whole first, while everything goes on. Calls that come then wait
        until the change is made, but for "keep". Raises ApiError and EngineUnavailable; nothing is changed
        then, but that with "abort" calls may have been.
        """
        async with self._changing:
            engine = self._serving_engine()
            try:
                digest = await asyncio.to_thread(weights_digest, directory, self._cache_dir)
            except CheckpointError as error:
                told = str(error).replace(f"{directory.parent}/", "")
                raise invalid_argument([Violation("directory", told)]) from error
            model = self._front.model
            if digest == model.weights_digest:
                numerics_id = model.ready.numerics_id
                return Update(model.weights_version, digest, numerics_id, unchanged=True)
            staged, restarts = next_ticket(), engine.restarts
            try:
                try:
                    await engine.change(StageWeights(staged, str(directory), digest))
                except ChangeRefused as error:
                    raise refused(error, directory) from error
                return await self._apply(engine, staged, restarts, directory, digest, mode)
            except BaseException:
                self._drop(staged)
                raise

    async def _apply(
        self, engine: ChangingEngine, staged: int, restarts: int, directory: Path, digest: str, mode: Mode
    ) -> Update:
        if mode == "keep":
            done = await self._change(engine, staged, restarts, directory, digest)
            return replace(done, num_kept=len(self._front.computing()))
        with self._front.held():
            calls = self._front.computing()
            if mode == "abort":
                error = RequestAborted("the weights of the model were replaced", "WEIGHTS_UPDATED")
                self._front.doom(calls, error)
            await self._front.wait_for_end(calls)
            done = await self._change(engine, staged, restarts, directory, digest)
            return replace(done, num_aborted=len(calls) if mode == "abort" else 0)

    async def _change(
        self, engine: ChangingEngine, staged: int, restarts: int, directory: Path, digest: str
    ) -> Update:
        """The one moment at which the weights change, in the worker and then here."""
        if engine.restarts != restarts:
            raise EngineUnavailable("the worker was restarted while the weights were read", RETRY_RESTARTED)
        model = self._front.model
        version = model.weights_version + 1
        # From now on an answer may be of both: whoever has the old model says so (`ServedModel.numerics_id`).
        model.in_force.version = version
        changing = asyncio.ensure_future(engine.change(ApplyWeights(next_ticket(), staged)))
        cancelled = await _done(changing)
        try:
            changed = changing.result()
        except EngineError as error:
            model.in_force.version = model.weights_version
            raise (refused(error, directory) if isinstance(error, ChangeRefused) else error) from error
        model = replace(
            self._front.model,  # adapters may have come meanwhile
            ready=replace(model.ready, numerics_id=changed.numerics_id),
            weights_digest=digest,
            weights_version=version,
        )
        engine.config = replace(engine.config, weights=str(directory), weights_digest=digest)
        self._front.serve(model, self._front.engine)
        self._updated(version, changed.pause)
        if cancelled:
            raise asyncio.CancelledError
        return Update(version, digest, changed.numerics_id, pause=changed.pause)

    def _drop(self, staged: int) -> None:
        try:
            self._serving_engine().tell(DropWeights(next_ticket(), staged))
        except EngineUnavailable:
            pass  # the worker is gone, and they with it

    def _serving_engine(self) -> ChangingEngine:
        if self._engine is None:
            raise EngineUnavailable("the engine is starting")
        return self._engine


async def _done(task: asyncio.Future[Any]) -> bool:
    """Waits for its end, whatever comes: who changes half of something must see the other half changed.

    Whether the caller was cancelled meanwhile.
    """
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled
