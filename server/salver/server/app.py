"""One server from its start to its end.

The port opens first and says NOT_SERVING; then the checkpoint is found, the worker and the
tokenizer load side by side, and health turns to SERVING. A signal drains; a second one ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from salver.model.hyperparameters import hyperparameters
from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.engine.errors import EngineStartError
from salver.server.engine.process import EngineProcess, EngineState
from salver.server.engine.request import Ready, StepMessage
from salver.server.loading import (
    Loaded,
    StartError,
    check_adapters,
    find_checkpoint,
    find_kernel,
    find_speculative_checkpoint,
    load_front,
    served_name,
)
from salver.server.log import log_event
from salver.server.metrics import Metrics
from salver.server.metrics_compat import exposed
from salver.server.reloading import BadFile
from salver.server.rpc.adapters import first_adapters
from salver.server.rpc.models import version
from salver.server.rpc.served import Front, RequestLimits, ServedModel
from salver.server.rpc.server import STATUS_CODES, PortInUse, RpcServer, all_methods
from salver.server.rpc.tracing import TracingUnavailable
from salver.server.startup_phases import StartupPhases, process_age, say

_log = logging.getLogger("salver.server")
_OPEN_FILES = 65536
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_T = TypeVar("_T")


async def _in_daemon_thread(work: Callable[[], _T]) -> _T:
    """`work()` in a thread that need not end before the process does: a download, a conversion."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def settle(value: _T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(_T, value))

    def run() -> None:
        value: _T | None = None
        error: BaseException | None = None
        try:
            value = work()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:
            pass  # the loop has ended meanwhile, and nobody waits

    threading.Thread(target=run, daemon=True, name="start").start()
    return await result


class _Ended(Exception):
    """A signal came while the model was still loading."""


class Application:
    """The parts of one server. `run()` once, on the loop that it was made on."""

    def __init__(
        self, config: ServerConfig, make_engine: Callable[..., EngineProcess] = EngineProcess
    ) -> None:
        """`make_engine` is called as EngineProcess is, with the configuration and what to tell."""
        self.config = config
        self._make_engine = make_engine
        self.name = served_name(config)
        check_adapters(config, self.name)
        self.metrics = Metrics(
            self.name,
            methods=all_methods(admin=config.admin_port is not None),
            codes=STATUS_CODES,
            build={"version": version(), "device": config.device, "dtype": config.dtype},
        )
        self.phases = StartupPhases(self.metrics.started_up)
        self.front = Front(self.metrics.rejected)
        self.admission = Admission(
            config.max_queued_requests, config.max_queued_tokens, self.metrics.rejected,
            deadlines=config.deadline_admission,
        )  # fmt: skip
        try:
            self.rpc = RpcServer(config, self.front, self.admission, self.metrics, self.phases.done)
        except (BadFile, TracingUnavailable) as error:
            raise StartError(str(error)) from error
        self.engine: EngineProcess | None = None
        self._signalled = asyncio.Event()

    async def run(self) -> int:
        """Serves until a signal. The exit status. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        say(f"salver {version()}")
        metrics_server: WSGIServer | None = None
        try:
            self.address = await self._open()
            say(f"listening on {self.address}")
            self._say_guards()
            metrics_server = await self._open_metrics()
            try:
                await self._unless_signalled(self._load())
            except _Ended:
                _log.info("ended while loading")
                return 0
            say(f"serving {self.name} on {self.address}")
            await self._signalled.wait()
            say(f"draining: running calls have {self.config.drain_period:g} s; a second signal ends at once")
            await self.rpc.drain()
            return 0
        finally:
            await self._close(metrics_server)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._signalled.is_set():
            self._signalled.set()
            return
        # The worker ends by itself when its socket closes.
        say("ended by a second signal")
        os._exit(128 + number)

    def _say_guards(self) -> None:
        """What of TLS and tokens is on; and a warning where tokens travel in the clear."""
        config = self.config
        tls = "" if config.tls_cert is None else "mTLS" if config.tls_client_ca is not None else "TLS"
        on = [word for word in (tls, "tokens" if config.tokens is not None else "") if word]
        if on:
            say(f"calls need {' and '.join(on)}")
        if config.tokens is not None and not tls and config.host not in _LOOPBACK:
            _log.warning("--tokens without --tls-cert: everybody on the way can read the tokens")
        if config.admin_is_open and config.admin_tls[0] is None:
            _log.warning("--admin-host without TLS: everybody on the way can read the admin tokens")

    async def _open(self) -> str:
        try:
            if (probes := await self.rpc.open_health_port()) is not None:
                say(f"health on {probes}")
            if (admin := await self.rpc.open_admin_port()) is not None:
                say(f"admin on {admin}")
            return await self.rpc.open()
        except PortInUse as error:
            raise StartError(str(error)) from error

    async def _open_metrics(self) -> WSGIServer | None:
        port, host = self.config.metrics_port, self.config.resolved_metrics_host
        if port is None:
            return None
        try:
            # In a thread: it asks the resolver for the host's name.
            registry = exposed(self.metrics.registry, self.config.metrics_compat)
            server, _ = await asyncio.to_thread(start_http_server, port, host, registry)
        except OSError as error:
            reason = error.strerror or error
            raise StartError(f"--metrics-port {port}: cannot listen on {host}:{port}: {reason}") from error
        shown = f"[{host}]" if ":" in host else host
        say(f"metrics on http://{shown}:{server.server_port}/metrics")
        return server

    async def _unless_signalled(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is cancelled (and _Ended raised) when a signal comes first."""
        task = asyncio.ensure_future(work)
        signalled = asyncio.ensure_future(self._signalled.wait())
        try:
            await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _Ended
        finally:
            signalled.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _load(self) -> None:
        phases = self.phases
        phases.add("start the front", process_age())
        with phases.phase("find the checkpoint"):
            checkpoint, digest = await _in_daemon_thread(lambda: find_checkpoint(self.config))
            draft = await _in_daemon_thread(lambda: find_speculative_checkpoint(self.config, checkpoint))
        with phases.phase("find the kernel"):
            library, reason = await _in_daemon_thread(lambda: find_kernel(self.config))
        started = time.monotonic()
        self.engine = self._make_engine(
            self.config.engine_config(
                checkpoint, digest, kernel_library=library, no_kernel=reason, speculative_checkpoint=draft
            ),
            on_step=self._on_step,
            on_state=self._on_engine_state,
        )
        self.metrics.worker.worker = self.engine
        starting = asyncio.create_task(self.engine.start())
        try:
            loaded = await _in_daemon_thread(lambda: load_front(checkpoint))
            front_seconds = time.monotonic() - started
            ready = await starting
            ready_at = time.monotonic()
        except EngineStartError as error:
            raise StartError(str(error)) from error
        finally:
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
        phases.add("load the tokenizer (beside)", front_seconds)
        after_torch = 0.0
        for name, seconds in ready.phases:
            phases.add(name, seconds)
            after_torch = 0.0 if name == "import torch" else after_torch + seconds
        model = self._served_model(loaded, ready, digest)
        self.admission.ready(ready)
        if ignored := loaded.generation_config.ignored:
            log_event(
                _log, logging.WARNING, "not implemented, of generation_config.json", fields=",".join(ignored)
            )
        self.front.serve(model, self.engine)
        self.rpc.adapters.serve(self.engine)
        self.rpc.weights.serve(self.engine)
        self.rpc.set_ready(True)
        phases.add("since torch was imported", after_torch + time.monotonic() - ready_at)
        phases.add("since the process started", process_age())
        self._describe(ready, model.limits)

    def _describe(self, ready: Ready, limits: RequestLimits) -> None:
        log_event(
            _log, logging.INFO, "ready", model=self.name, device=ready.device, dtype=ready.dtype,
            quantization=ready.quantization,
            kernels=ready.kernels, numerics_id=ready.numerics_id, parameters=ready.num_parameters,
            max_model_len=ready.max_model_len, max_num_seqs=ready.max_num_seqs,
            max_num_batched_tokens=ready.max_num_batched_tokens,
            kv_cache_tokens=limits.cache_tokens,
        )  # fmt: skip

    def _served_model(self, loaded: Loaded, ready: Ready, digest: str) -> ServedModel:
        config = self.config
        return ServedModel(
            name=self.name,
            architecture=loaded.spec.architecture,
            tokenizer=loaded.tokenizer,
            chat_template=loaded.chat_template,
            ready=ready,
            adapters=first_adapters(config.adapter, ready.adapters),
            weights_digest=digest,
            generation_config=loaded.generation_config,
            checkpoint=str(loaded.checkpoint),
            limits=RequestLimits(
                max_model_len=ready.max_model_len,
                # Block 0 is the null block of padding rows.
                cache_tokens=(ready.num_blocks - 1) * ready.block_size,
                vocab_size=loaded.spec.vocab_size,
                max_num_seqs=ready.max_num_seqs,
                max_num_batched_tokens=ready.max_num_batched_tokens,
                max_samples=min(config.max_samples, ready.max_num_seqs),
                max_queued_requests=config.max_queued_requests,
                max_queued_tokens=config.max_queued_tokens,
                max_message_bytes=config.max_message_size,
            ),
            embedding=loaded.embedding,
            embedding_dimensions=loaded.embedding.dimensions(loaded.spec.hidden_size),
            spec=loaded.spec,
            hyperparameters=hyperparameters(loaded.spec, loaded.fields, loaded.generation_config),
        )

    def _on_step(self, message: StepMessage) -> None:
        self.metrics.step(message)
        self.admission.forecast.stepped(message)

    def _on_engine_state(self, state: EngineState) -> None:
        self.rpc.set_engine_state(state)
        if state is EngineState.SERVING and self.engine is not None and self.engine.restarts:
            self._restarted(self.engine)
        level = logging.INFO if state in (EngineState.SERVING, EngineState.STOPPED) else logging.WARNING
        log_event(_log, level, "engine state", state=state.value)

    def _restarted(self, engine: EngineProcess) -> None:
        assert engine.ready is not None
        for adapter, reason in self.rpc.adapters.restarted(engine.ready):
            log_event(
                _log, logging.ERROR, "adapter lost", adapter=adapter.name, version=adapter.version,
                reason=reason,
            )  # fmt: skip

    async def _close(self, metrics_server: WSGIServer | None) -> None:
        if self.engine is not None:
            await self.engine.stop()
        await self.rpc.close()
        if metrics_server is not None:
            await asyncio.to_thread(metrics_server.shutdown)
            metrics_server.server_close()


def _raise_open_files() -> None:
    """Each connection is an open file, and the usual soft limit of 1024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def run(config: ServerConfig, make_engine: Callable[..., EngineProcess] = EngineProcess) -> int:
    """Serves as `config` says until a signal ends it. The exit status. Raises StartError."""
    _raise_open_files()
    return await Application(config, make_engine).run()
