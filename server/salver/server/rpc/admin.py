"""AdminService: changes what is served while it is served."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from salver.server.rpc import convert
from salver.server.rpc.adapters import Adapters
from salver.server.rpc.calls import current_call
from salver.server.rpc.directories import NAME_RULE, folder_under, is_name
from salver.server.rpc.errors import ApiError, shortened
from salver.server.rpc.served import Front, LoadedAdapter
from salver.server.rpc.validation import Violations
from salver.server.rpc.weights import Mode, Weights
from salver.v1 import admin_pb2, admin_pb2_grpc

DEFAULT_PAGE = 100
MAX_PAGE = 1000
_UPDATE_MODES: dict[int, Mode] = {
    admin_pb2.IN_FLIGHT_UNSPECIFIED: "wait",
    admin_pb2.IN_FLIGHT_WAIT: "wait",
    admin_pb2.IN_FLIGHT_ABORT: "abort",
    admin_pb2.IN_FLIGHT_KEEP: "keep",
}


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """On a port of its own, see `admin_server`."""

    def __init__(
        self, front: Front, adapters: Adapters, weights: Weights, *,
        adapter_root: Path | None, weights_root: Path | None,
    ) -> None:  # fmt: skip
        self._front = front
        self._adapters = adapters
        self._weights = weights
        self._adapter_root = adapter_root
        self._weights_root = weights_root

    async def LoadAdapter(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        directory = request.directory or request.name
        _audit(adapter=request.name, directory=directory)
        if self._adapter_root is None:
            raise _not_configured("--adapter-root")
        violations = Violations()
        if not is_name(request.name):
            violations.add("name", f"{shortened(request.name)!r} {NAME_RULE}")
        elif request.name == self._front.model.name:
            violations.add("name", f"{request.name!r} is the name of the model itself")
        violations.raise_any()
        # In a thread: the directory may be on a network.
        path = await asyncio.to_thread(folder_under, self._adapter_root, directory, "directory")
        made, before = await self._adapters.load(request.name, path)
        _audit(version=made.version, digest=made.facts.digest)
        return admin_pb2.LoadAdapterResponse(
            adapter=_message(made, False, *self._adapters.requests()),
            replaced_version=before.version if before is not None and before is not made else None,
            unchanged=before is made,
        )

    async def UnloadAdapter(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        mode = request.in_flight
        _audit(adapter=request.name, in_flight=_mode_name(mode))
        violations = Violations()
        if mode not in (
            admin_pb2.IN_FLIGHT_UNSPECIFIED, admin_pb2.IN_FLIGHT_WAIT, admin_pb2.IN_FLIGHT_ABORT
        ):  # fmt: skip
            violations.add("in_flight", "must be IN_FLIGHT_WAIT or IN_FLIGHT_ABORT")
        violations.raise_any()
        requests = self._adapters.requests()
        adapter, aborted = await self._adapters.unload(request.name, mode == admin_pb2.IN_FLIGHT_ABORT)
        _audit(version=adapter.version, aborted=aborted)
        return admin_pb2.UnloadAdapterResponse(
            adapter=_message(adapter, True, *requests), num_aborted=aborted
        )

    async def ListAdapters(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        size = request.page_size or DEFAULT_PAGE
        violations = Violations()
        if size > MAX_PAGE:
            violations.add("page_size", f"{size} must be at most {MAX_PAGE}")
        after = _page_start(request.page_token, violations)
        violations.raise_any()
        rest = [item for item in self._adapters if (item[0].name, item[0].version) > after]
        page = rest[:size]
        token = f"{page[-1][0].version}@{page[-1][0].name}" if len(rest) > size else ""
        requests = self._adapters.requests()
        return admin_pb2.ListAdaptersResponse(
            adapters=[_message(adapter, retired, *requests) for adapter, retired in page],
            next_page_token=token,
            max_adapters=self._adapters.limit,
        )

    async def UpdateWeights(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        mode = request.in_flight
        _audit(directory=request.directory, in_flight=_mode_name(mode))
        if self._weights_root is None:
            raise _not_configured("--weights-root")
        violations = Violations()
        if mode not in _UPDATE_MODES:
            violations.add("in_flight", "must be IN_FLIGHT_WAIT, IN_FLIGHT_ABORT or IN_FLIGHT_KEEP")
        violations.raise_any()
        path = await asyncio.to_thread(folder_under, self._weights_root, request.directory, "directory")
        done = await self._weights.update(path, _UPDATE_MODES[mode])
        _audit(version=done.version, digest=done.digest, aborted=done.num_aborted, kept=done.num_kept)
        return admin_pb2.UpdateWeightsResponse(
            version=done.version, digest=done.digest, numerics_id=done.numerics_id,
            num_aborted=done.num_aborted, num_kept=done.num_kept, pause=convert.duration(done.pause),
            unchanged=done.unchanged,
        )  # fmt: skip


def _message(
    adapter: LoadedAdapter, retired: bool, running: Counter[str], waiting: Counter[str]
) -> admin_pb2.Adapter:
    facts = adapter.facts
    return admin_pb2.Adapter(
        name=adapter.name, version=adapter.version, digest=facts.digest, rank=facts.rank,
        num_bytes=facts.num_bytes, num_running=running[facts.key], num_waiting=waiting[facts.key],
        retired=retired,
    )  # fmt: skip


def _page_start(token: str, violations: Violations) -> tuple[str, int]:
    """Name and version of the last one of the page before. A page goes on there whatever came and went."""
    if not token:
        return "", 0
    version, _, name = token.partition("@")
    if not version.isdecimal() or not is_name(name):
        violations.add("page_token", "is not one that this server gave")
        return "", 0
    return name, int(version)


def _mode_name(mode: int) -> str:
    names = admin_pb2.InFlight.DESCRIPTOR.values_by_number
    return names[mode].name if mode in names else str(mode)


def _audit(**fields: Any) -> None:
    """What the call is about, for the line that is logged when it ends."""
    call = current_call()
    if call is not None:
        call.audit.update({key: shortened(v) if isinstance(v, str) else v for key, v in fields.items()})


def _not_configured(flag: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"this server was started without {flag}, which says where it may read from",
        reason="NOT_CONFIGURED",
    )
