"""grpc.health.v1: Check, List, Watch, from the engine's state and nothing else (no probe waits in a queue).

The servicer is our own: grpcio-health-checking's (1.71) forgets the other watchers of a
name when one of them leaves, and lets a watcher that does not read hold up every change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from salver.server.engine.process import EngineState

SERVICE_NAME = "grpc.health.v1.Health"
READINESS = "readiness"
LIVENESS = "liveness"

SERVING: int = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

# A worker that hangs, or that could not be restarted, is for the orchestrator to end.
_DEAD = (EngineState.STALLED, EngineState.FAILED)


class HealthService(health_pb2_grpc.HealthServicer):
    """Names: "" and `readiness`, one for each of `services`, and `liveness`.

    All but liveness say SERVING only while the engine serves and the server does not drain.
    Liveness says NOT_SERVING only when the worker is stalled or gone for good.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._names = ("", READINESS, *services)
        self._status: dict[str, int] = dict.fromkeys(self._names, NOT_SERVING)
        self._status[LIVENESS] = SERVING
        self._engine_state = EngineState.STARTING
        self._ready = False
        self._changed = asyncio.Event()

    def set_engine_state(self, state: EngineState) -> None:
        """The engine changed its state."""
        self._engine_state = state
        self._update()

    def set_ready(self, ready: bool) -> None:
        """Whether the front takes calls: true once the model is served, false from the drain on."""
        self._ready = ready
        self._update()

    def status(self, name: str) -> int:
        """The ServingStatus of a name; SERVICE_UNKNOWN for others."""
        return self._status.get(name, SERVICE_UNKNOWN)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._status:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthListResponse:
        statuses = {n: health_pb2.HealthCheckResponse(status=status) for n, status in self._status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        last: int | None = None
        while True:
            changed, status = self._changed, self.status(request.service)
            if status != last:
                last = status
                await context.write(health_pb2.HealthCheckResponse(status=status))
            else:
                await changed.wait()

    def _update(self) -> None:
        serving = self._ready and self._engine_state is EngineState.SERVING
        new: dict[str, int] = dict.fromkeys(self._names, SERVING if serving else NOT_SERVING)
        new[LIVENESS] = NOT_SERVING if self._engine_state in _DEAD else SERVING
        if new != self._status:
            self._status = new
            self._changed.set()
            self._changed = asyncio.Event()
