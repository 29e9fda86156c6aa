"""Changes of what the worker serves, made while it steps.

A thread of its own reads, checks and builds what a change needs, which takes long and changes nothing
that steps use. The loop then puts it in place between two steps. One change after the other, in the
order in which they were asked. `benchmarks/changes.py` measures how long steps stand still.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from salver.model.adapters import Adapter, AdapterSet
from salver.model.errors import CheckpointError
from salver.server.engine.adapter_startup import facts_of, read_adapter
from salver.server.engine.changes import (
    AdapterSource,
    ApplyWeights,
    Change,
    Changed,
    DropAdapter,
    DropWeights,
    LoadAdapter,
    Refusal,
    StageWeights,
)
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.request import Ready
from salver.server.engine.runner import ModelRunner, is_out_of_memory
from salver.server.engine.startup import DTYPES, numerics_id_of
from salver.server.engine.weight_staging import (
    StagedWeights,
    UnsupportedChange,
    stage_decoder,
    stage_encoder,
)

# What the thread leaves to the loop: puts it in place, and says what is told of it.
Install = Callable[[], Changed]


class Updates:
    """`begin` and `finish` are for the loop, which never waits here."""

    def __init__(self, core: EngineCore, config: EngineConfig, ready: Ready) -> None:
        """On the thread of the loop. `ready` is what was told of the engine."""
        self._core = core
        self._config = config
        self._ready = ready
        self._threads = torch.get_num_threads()
        digests = {facts.key: facts.digest for facts in ready.adapters}
        self._sources = {
            source.key: replace(source, digest=digests[source.key])
            for source in config.adapters
            if source.key in digests
        }
        self._staged: tuple[StageWeights, StagedWeights] | None = None
        self._waiting: deque[Change] = deque()
        self._current: Change | None = None
        self._built: deque[Install | Changed] = deque()  # by the thread, one at most

    def begin(self, change: Change) -> None:
        """Is made when those before it are."""
        self._waiting.append(change)
        self._next()

    def finish(self) -> Changed | None:
        """Puts in place what is built. What came of a change, None while none is ready."""
        if not self._built:
            return None
        change, built = self._current, self._built.popleft()
        assert change is not None
        if isinstance(built, Changed):
            changed = built
        else:
            begin = time.perf_counter()
            changed = built()
            changed = replace(changed, pause=time.perf_counter() - begin)
        self._current = None
        self._next()
        return changed

    def _next(self) -> None:
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            threading.Thread(target=self._build, args=(self._current,), name="change", daemon=True).start()

    def _build(self, change: Change) -> None:
        """In the thread. Its products and copies use one core, so that the steps keep the others."""
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                built: Install | Changed = self._prepare(change)
        except CheckpointError as error:
            built = Changed(change.ticket, Refusal.INVALID, str(error))
        except UnsupportedChange as error:
            built = Changed(change.ticket, Refusal.UNSUPPORTED, str(error))
        except Exception as error:
            if is_out_of_memory(error):
                built = Changed(change.ticket, Refusal.MEMORY, str(error).partition("\n")[0])
            else:
                traceback.print_exc()
                built = Changed(change.ticket, Refusal.BUG, f"{type(error).__name__}: {error}")
        self._built.append(built)

    def _prepare(self, change: Change) -> Install | Changed:
        match change:
            case LoadAdapter(ticket, source):
                runner, model, adapters = self._adapted()
                made = read_adapter(source, model, self._config.max_adapter_rank)
                facts = facts_of(source.key, made)
                sources = self._sources | {source.key: replace(source, digest=made.digest)}
                adapters[source.key] = made
                return self._replace(runner, model, adapters, sources, Changed(ticket, adapter=facts))
            case DropAdapter(ticket, key):
                runner, model, adapters = self._adapted()
                adapters.pop(key, None)
                sources = {kept: source for kept, source in self._sources.items() if kept != key}
                return self._replace(runner, model, adapters, sources, Changed(ticket))
            case StageWeights(ticket, directory):
                self._staged = None
                staged = self._stage(Path(directory))
                self._adapters_of(staged)
                self._staged = (change, staged)
                return Changed(ticket)
            case ApplyWeights(ticket, number):
                if self._staged is None or self._staged[0].ticket != number:
                    raise LookupError(f"no weights are staged under {number}")
                return self._exchange(ticket, *self._staged)
            case DropWeights(ticket, number):
                if self._staged is not None and self._staged[0].ticket == number:
                    self._staged = None
                return Changed(ticket)

    def _stage(self, directory: Path) -> StagedWeights:
        runner = self._core.runner
        if isinstance(runner, ModelRunner):
            return stage_decoder(runner, self._config, directory, self._threads)
        assert isinstance(runner, EncoderRunner)
        return stage_encoder(runner, self._config, directory, self._threads)

    def _adapters_of(self, staged: StagedWeights) -> AdapterSet | None:
        """Those that are there, read anew for another base. Raises CheckpointError."""
        runner = self._core.runner
        if not isinstance(runner, ModelRunner | EncoderRunner) or runner.adapters is None:
            return None
        # The kernel may have taken the weights over already, but knows what they were.
        base = staged.base if isinstance(staged.model, nn.Module) else staged.model
        most = self._config.max_adapter_rank
        read = {key: read_adapter(source, base, most) for key, source in self._sources.items()}
        return AdapterSet(staged.model, read, runner.row_multiple, install=False)

    def _exchange(self, ticket: int, change: StageWeights, staged: StagedWeights) -> Install:
        core, runner = self._core, self._core.runner
        assert isinstance(runner, ModelRunner | EncoderRunner)
        adapters = self._adapters_of(staged)
        config = replace(self._config, weights=change.directory, weights_digest=change.digest)
        numerics_id = numerics_id_of(
            config, runner.device, DTYPES[self._ready.dtype], self._threads, runner.row_multiple,
            self._ready.kernels, self._ready.fixed_rows,
        )  # fmt: skip

        def install() -> Changed:
            staged.install()
            if adapters is not None:
                adapters.install()
                runner.adapters = adapters
            core.weights_changed()
            self._staged, self._config = None, config
            return Changed(ticket, numerics_id=numerics_id)

        return install

    def _adapted(self) -> tuple[ModelRunner | EncoderRunner, object, dict[str, Adapter]]:
        runner = self._core.runner
        if not isinstance(runner, ModelRunner | EncoderRunner) or runner.adapters is None:
            raise TypeError("this engine was started without adapters")
        return runner, runner.model, dict(runner.adapters.adapters)

    def _replace(
        self,
        runner: ModelRunner | EncoderRunner,
        model: object,
        adapters: dict[str, Adapter],
        sources: dict[str, AdapterSource],
        told: Changed,
    ) -> Install:
        made = AdapterSet(model, adapters, runner.row_multiple, install=False)

        def install() -> Changed:
            made.install()
            runner.adapters, self._sources = made, sources
            return told

        return install
