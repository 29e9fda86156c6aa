"""The gRPC port: options, interceptor, every service, and its end in peace."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.engine.process import EngineState
from salver.server.log import log_event
from salver.server.metrics import Metrics
from salver.server.rpc.adapters import Adapters
from salver.server.rpc.admin_server import AdminServer
from salver.server.rpc.calls import Call
from salver.server.rpc.encoding import EncodingService
from salver.server.rpc.generation import GenerationService
from salver.server.rpc.grammar import GrammarCompiler
from salver.server.rpc.health import SERVICE_NAME as HEALTH
from salver.server.rpc.health import HealthService
from salver.server.rpc.inspection import InspectionService
from salver.server.rpc.interceptor import CallInterceptor
from salver.server.rpc.models import ModelService, version
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.reflection import V1, V1ALPHA, add_reflection
from salver.server.rpc.served import Front
from salver.server.rpc.tenancy import Tenancy
from salver.server.rpc.tls import server_credentials
from salver.server.rpc.tokenization import TokenizationService
from salver.server.rpc.tracing import Tracing
from salver.server.rpc.weights import Weights
from salver.server.tenants import Tenants
from salver.v1 import (
    admin_pb2,
    encoding_pb2,
    encoding_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inspection_pb2,
    inspection_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)

_log = logging.getLogger("salver.rpc")

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, encoding_pb2, inspection_pb2, tokenization_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
STATUS_CODES = tuple(code.name for code in grpc.StatusCode)
# After the last stream has ended, its last bytes are still on their way.
_FLUSH_SECONDS = 0.5
# Keeps connections through proxies that drop idle ones, and finds clients that are gone without a word.
_KEEPALIVE_SECONDS = 30
_HANDSHAKE_SECONDS = 10
_MAX_METADATA = 16 * 1024
_OWN_FILES = 256  # open files that are not for clients' connections


class PortInUse(Exception):
    """The address cannot be listened on; the message names --port."""


def all_methods(admin: bool = False) -> dict[str, tuple[bool, bool]]:
    """Every method that the port answers, or one of its ports: full name to (request streams, response
    streams)."""

    def of_file(file: object) -> Iterator[tuple[str, tuple[bool, bool]]]:
        for service in file.DESCRIPTOR.services_by_name.values():  # type: ignore[attr-defined]
            for method in service.methods:
                name = f"/{service.full_name}/{method.name}"
                yield name, (method.client_streaming, method.server_streaming)

    files = (generation_pb2, encoding_pb2, inspection_pb2, tokenization_pb2, model_pb2, health_pb2)
    methods = dict(entry for file in files for entry in of_file(file))
    if admin:
        methods |= of_file(admin_pb2)
    for name, streaming in of_file(reflection_pb2):
        methods[name] = methods[name.replace(V1ALPHA, V1)] = streaming
    return methods


class RpcServer:
    """The port and everything behind it that is not the engine."""

    def __init__(
        self,
        config: ServerConfig,
        front: Front,
        admission: Admission,
        metrics: Metrics,
        startup_phases: Sequence[tuple[str, float]],
    ) -> None:
        """Must be made on the event loop that it runs on. Raises BadFile for certificates
        and tokens, and TracingUnavailable."""
        self._config = config
        self._front = front
        self._prompts = PromptReader()
        self._grammars = GrammarCompiler()
        self.health = HealthService(SERVICES)
        self._credentials = server_credentials(
            config.tls_cert, config.tls_key, config.tls_client_ca, reloaded=metrics.reloaded
        )
        tenants = None if config.tokens is None else Tenants(config.tokens, metrics.reloaded)
        self._tracing: Tracing | None = None
        if config.otlp_endpoint is not None:
            self._tracing = Tracing(config.otlp_endpoint, config.model, version())
        tenancy = Tenancy(tenants, metrics.rejected)
        self._calls = CallInterceptor(metrics, front.gate, tenancy.enter, self._ended)
        self._server = grpc.aio.server(
            interceptors=(self._calls,),
            options=_options(config),
            # A call costs about 30 KB of the front, also one whose message never comes.
            maximum_concurrent_rpcs=4 * _streams(config),
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(front, admission, metrics, self._prompts, self._grammars), self._server
        )
        encoding_pb2_grpc.add_EncodingServiceServicer_to_server(
            EncodingService(front, admission, metrics, self._prompts), self._server
        )
        inspection_pb2_grpc.add_InspectionServiceServicer_to_server(
            InspectionService(front, admission, metrics, self._prompts, self._grammars), self._server
        )
        tokenization_pb2_grpc.add_TokenizationServiceServicer_to_server(
            TokenizationService(front, self._prompts), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(front, config.drain_period, startup_phases), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        add_reflection(self._server, (*SERVICES, HEALTH))
        most = len(config.adapter) if config.adapter_root is None else config.resolved_max_adapters
        self.adapters = metrics.adapters.adapters = Adapters(front, most)
        self.weights = Weights(front, config.resolved_cache_dir, metrics.weights_updated)
        self.admin: AdminServer | None = None
        if config.admin_port is not None:
            self.admin = AdminServer(config, front, self.adapters, self.weights, metrics)
        self._probes: grpc.aio.Server | None = None
        if config.health_port is not None:
            self._probes = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._probes)

    def _ended(self, call: Call, code: str, metadata: Any) -> None:
        self._front.left(call)
        if call.method.startswith(f"/{HEALTH}/"):
            return  # probes: every few seconds the same
        if self._config.log_requests:
            seconds = round(time.monotonic() - call.begun, 6)
            log_event(
                _log, logging.INFO, "call", method=call.method, request_id=call.request_id,
                tenant=call.tenant, code=code, seconds=seconds,
                prompt_tokens=sum(r.prompt_tokens for r in call.requests),
                output_tokens=sum(r.output_tokens for r in call.requests),
            )  # fmt: skip
        if self._tracing is not None:
            self._tracing.ended(call, code, metadata)

    async def open(self) -> str:
        """Listens, and answers NOT_SERVING and UNAVAILABLE for now. The address. Raises PortInUse."""
        address = self._listen(self._server, "--port", self._config.port, self._credentials)
        await self._server.start()
        return address

    async def open_health_port(self) -> str | None:
        """Listens there too, in plaintext. The address; None when there is none. Raises PortInUse."""
        if self._probes is None or self._config.health_port is None:
            return None
        address = self._listen(self._probes, "--health-port", self._config.health_port, None)
        await self._probes.start()
        return address

    async def open_admin_port(self) -> str | None:
        """Listens there too. The address; None when there is none. Raises PortInUse."""
        if self.admin is None or self._config.admin_port is None:
            return None
        address = self._listen(
            self.admin.server, "--admin-port", self._config.admin_port, self.admin.credentials,
            ("--admin-host", self._config.admin_host),
        )  # fmt: skip
        await self.admin.server.start()
        return address

    def _listen(
        self,
        server: grpc.aio.Server,
        flag: str,
        port: int,
        credentials: grpc.ServerCredentials | None,
        at: tuple[str, str] | None = None,
    ) -> str:
        """`at` is another flag for the address, and what it says."""
        host_flag, bare = at or ("--host", self._config.host)
        host = f"[{bare}]" if ":" in bare else bare
        address = f"{host}:{port}"
        try:
            if credentials is None:
                return f"{host}:{server.add_insecure_port(address)}"
            return f"{host}:{server.add_secure_port(address, credentials)}"
        except RuntimeError as error:
            raise PortInUse(_why_not(bare, port, flag, host_flag)) from error

    def set_ready(self, ready: bool) -> None:
        """As `HealthService.set_ready`, of every port."""
        self.health.set_ready(ready)
        if self.admin is not None:
            self.admin.health.set_ready(ready)

    def set_engine_state(self, state: EngineState) -> None:
        """As `HealthService.set_engine_state`, of every port."""
        self.health.set_engine_state(state)
        if self.admin is not None:
            self.admin.health.set_engine_state(state)

    async def drain(self) -> None:
        """Takes no new calls and waits until running ones have ended, or the drain period has."""
        self._front.drain()
        self.set_ready(False)
        try:
            async with asyncio.timeout(self._config.drain_period):
                await self._calls.wait_idle()
        except TimeoutError:
            self._front.end_running()

    async def close(self) -> None:
        """Closes the port; what still runs has a moment to send its status."""
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await self._calls.wait_idle()
        except TimeoutError:
            pass
        # Watch streams never end by themselves.
        await self._server.stop(0 if self._calls.num_running else 0.05)
        for other in (self._probes, None if self.admin is None else self.admin.server):
            if other is not None:
                await other.stop(0)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        self._prompts.close()
        await self._grammars.close()


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 0),  # or a second server shares the port silently
        ("grpc.max_receive_message_length", config.max_message_size),
        ("grpc.max_send_message_length", config.max_message_size),
        ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ping as often, also while no call runs.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        *_abuse_options(config),
    ]
    if config.max_connection_age:
        # No grace: a stream may be longer than any.
        options.append(("grpc.max_connection_age_ms", round(config.max_connection_age * 1000)))
    return options


def _streams(config: ServerConfig) -> int:
    """Most calls of one connection. Above what the queue takes: a client gets our RESOURCE_EXHAUSTED
    rather than waits in its own channel.
    """
    return max(1024, 2 * config.max_queued_requests)


def _abuse_options(config: ServerConfig) -> Iterator[tuple[str, int]]:
    """Against what no honest client does. tests/faults/test_wire.py shows what each is good for."""
    streams = _streams(config)
    # Streams that were reset count until they are freed: rapid resets are refused from there on.
    yield "grpc.max_concurrent_streams", streams
    # Calls that have come and that our loop has not taken yet, about 8 KB each. Above the first
    # number gRPC ends some at random, above the second all, CANCELLED, whosever they are: its own
    # numbers (1000 and 3000) let the resets of one connection end its neighbours' calls.
    yield "grpc.server.max_pending_requests", 4 * streams
    yield "grpc.server.max_pending_requests_hard_limit", 8 * streams
    # Between gRPC's own two numbers (8 and 16 KiB) calls are refused at random.
    yield "grpc.max_metadata_size", _MAX_METADATA
    yield "grpc.absolute_max_metadata_size", _MAX_METADATA
    # Connections that say nothing; gRPC would wait for a minute or two.
    yield "grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000
    yield "grpc.http2.settings_timeout", _HANDSHAKE_SECONDS * 1000
    # Connections beyond are closed at once: a worker can be started anew and metrics be read all the same.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        yield "grpc.max_allowed_incoming_connections", max(files - _OWN_FILES, files // 2)


def _why_not(host: str, port: int, flag: str, host_flag: str) -> str:
    """gRPC says only that it failed: the reason is in trying again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"{host_flag} {host}: cannot listen there: {error.strerror or error}"
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            probe.listen()
    except OSError as error:
        named = f"{flag} {port}" if error.errno in (98, 48, 13) else f"{host_flag} {host}"
        return f"{named}: cannot listen on {host}:{port}: {error.strerror}"
    return f"{flag} {port}: cannot listen on {host}:{port}"
