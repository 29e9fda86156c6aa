"""Changes of what the worker serves, made while it steps.

A thread of its own reads, checks and builds what a change needs, which takes long and changes nothing
that steps use. The loop then puts it in place between two steps, which takes about a millisecond. One
change after the other, in the order in which they were asked.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

import torch

from salver.model.adapters import Adapter, AdapterSet
from salver.model.encoder import Encoder
from salver.model.errors import CheckpointError
from salver.model.transformer import Decoder
from salver.server.engine.changes import Change, Changed, DropAdapter, LoadAdapter, Refusal
from salver.server.engine.core import EngineCore
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.runner import ModelRunner, is_out_of_memory
from salver.server.engine.startup import facts_of, read_adapter

# What the thread leaves to the loop: puts it in place, and says what is told of it.
Install = Callable[[], Changed]


class Updates:
    """`begin` and `finish` are for the loop, which never waits here."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
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
            changed = Changed(changed.ticket, adapter=changed.adapter, pause=time.perf_counter() - begin)
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
        except Exception as error:
            if is_out_of_memory(error):
                built = Changed(change.ticket, Refusal.MEMORY, str(error).partition("\n")[0])
            else:
                traceback.print_exc()
                built = Changed(change.ticket, Refusal.BUG, f"{type(error).__name__}: {error}")
        self._built.append(built)

    def _prepare(self, change: Change) -> Install:
        match change:
            case LoadAdapter(ticket, source):
                runner, model, adapters = self._adapted()
                made = read_adapter(source, model)
                facts = facts_of(source.key, made)
                adapters[source.key] = made
                return self._replace(runner, model, adapters, Changed(ticket, adapter=facts))
            case DropAdapter(ticket, key):
                runner, model, adapters = self._adapted()
                adapters.pop(key, None)
                return self._replace(runner, model, adapters, Changed(ticket))

    def _adapted(self) -> tuple[ModelRunner | EncoderRunner, Decoder | Encoder, dict[str, Adapter]]:
        runner = self._core.runner
        if not isinstance(runner, ModelRunner | EncoderRunner) or runner.adapters is None:
            raise TypeError("this engine was started without adapters")
        return runner, runner.model, dict(runner.adapters.adapters)

    @staticmethod
    def _replace(
        runner: ModelRunner | EncoderRunner,
        model: Decoder | Encoder,
        adapters: dict[str, Adapter],
        told: Changed,
    ) -> Install:
        made = AdapterSet(model, adapters, runner.row_multiple, install=False)

        def install() -> Changed:
            made.install()
            runner.adapters = made
            return told

        return install
