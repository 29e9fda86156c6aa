"""The gRPC port: options, interceptor, every service, and its end in peace."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.metrics import Metrics
from salver.server.rpc.encoding import EncodingService
from salver.server.rpc.generation import GenerationService
from salver.server.rpc.health import SERVICE_NAME as HEALTH
from salver.server.rpc.health import HealthService
from salver.server.rpc.interceptor import CallInterceptor
from salver.server.rpc.models import ModelService
from salver.server.rpc.prompts import PromptReader
from salver.server.rpc.reflection import V1, V1ALPHA, add_reflection
from salver.server.rpc.served import Front
from salver.server.rpc.tokenization import TokenizationService
from salver.v1 import (
    encoding_pb2,
    encoding_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, encoding_pb2, tokenization_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
STATUS_CODES = tuple(code.name for code in grpc.StatusCode)
# After the last stream has ended, its last bytes are still on their way.
_FLUSH_SECONDS = 0.5
# Keeps connections through proxies that drop idle ones, and finds clients that are gone without a word.
_KEEPALIVE_SECONDS = 30


class PortInUse(Exception):
    """The address cannot be listened on; the message names --port."""


def all_methods() -> dict[str, tuple[bool, bool]]:
    """Every method that the port answers: full name to (request streams, response streams)."""

    def of_file(file: object) -> Iterator[tuple[str, tuple[bool, bool]]]:
        for service in file.DESCRIPTOR.services_by_name.values():  # type: ignore[attr-defined]
            for method in service.methods:
                name = f"/{service.full_name}/{method.name}"
                yield name, (method.client_streaming, method.server_streaming)

    methods = dict(
        entry
        for file in (generation_pb2, encoding_pb2, tokenization_pb2, model_pb2, health_pb2)
        for entry in of_file(file)
    )
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
        """Must be made on the event loop that it runs on."""
        self._config = config
        self._front = front
        self._prompts = PromptReader()
        self.health = HealthService(SERVICES)
        self._calls = CallInterceptor(metrics, front.gate)
        self._server = grpc.aio.server(interceptors=(self._calls,), options=_options(config))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(front, admission, metrics, self._prompts), self._server
        )
        encoding_pb2_grpc.add_EncodingServiceServicer_to_server(
            EncodingService(front, admission, metrics, self._prompts), self._server
        )
        tokenization_pb2_grpc.add_TokenizationServiceServicer_to_server(
            TokenizationService(front, self._prompts), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(front, config.drain_period, startup_phases), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        add_reflection(self._server, (*SERVICES, HEALTH))

    async def open(self) -> str:
        """Listens, and answers NOT_SERVING and UNAVAILABLE for now. The address. Raises PortInUse."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise PortInUse(_why_not(self._config.host, self._config.port)) from error
        await self._server.start()
        return f"{host}:{port}"

    async def drain(self) -> None:
        """Takes no new calls and waits until running ones have ended, or the drain period has."""
        self._front.drain()
        self.health.set_ready(False)
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
        self._prompts.close()


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
    ]
    if config.max_connection_age:
        # No grace: a stream may be longer than any.
        options.append(("grpc.max_connection_age_ms", round(config.max_connection_age * 1000)))
    return options


def _why_not(host: str, port: int) -> str:
    """gRPC says only that it failed: the reason is in trying again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"--host {host}: cannot listen there: {error.strerror or error}"
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            probe.listen()
    except OSError as error:
        flag = "--port" if error.errno in (98, 48, 13) else "--host"
        value = port if flag == "--port" else host
        return f"{flag} {value}: cannot listen on {host}:{port}: {error.strerror}"
    return f"--port {port}: cannot listen on {host}:{port}"
