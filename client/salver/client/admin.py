"""AdminService: adapters and weights changed while a server runs, on its admin port. Both clients of it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from types import TracebackType
from typing import Any, Literal, Self

from salver.client.addresses import Address
from salver.client.async_client import AsyncClient
from salver.client.client import Client
from salver.client.options import ConnectionOptions
from salver.client.rpcs import Rpc
from salver.v1 import admin_pb2

ADMIN_ADDRESS = "127.0.0.1:50052"
CHANGE_TIMEOUT = 300.0  # seconds: files are read, calls are waited for

InFlight = Literal["wait", "abort"]
InFlightOfUpdate = Literal["wait", "abort", "keep"]
_IN_FLIGHT = {
    "wait": admin_pb2.IN_FLIGHT_WAIT,
    "abort": admin_pb2.IN_FLIGHT_ABORT,
    "keep": admin_pb2.IN_FLIGHT_KEEP,
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of a LoRA adapter. `retired`: only calls that began with it still have it.

    `num_running` and `num_waiting` are requests in the engine; `digest` is of its files, in hex.
    """

    name: str
    version: int
    digest: str
    rank: int
    num_bytes: int
    num_running: int
    num_waiting: int
    retired: bool


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """What a load did. `unchanged`: the same files were served under the name already."""

    adapter: Adapter
    replaced_version: int | None
    unchanged: bool


@dataclass(frozen=True, slots=True)
class AdapterUnload:
    """The adapter as it was, and how many calls were aborted."""

    adapter: Adapter
    num_aborted: int


@dataclass(frozen=True, slots=True)
class WeightsUpdate:
    """What an update did. `version` is that of every answer from now on (`weights_version`); `pause` in
    seconds, that steps stood still. `unchanged`: the same files were served already."""

    version: int
    digest: str
    numerics_id: str
    num_aborted: int
    num_kept: int
    pause: float
    unchanged: bool


def _load(name: str, directory: str, timeout: float | None) -> Rpc:
    def decode(reply: admin_pb2.LoadAdapterResponse) -> AdapterLoad:
        replaced = reply.replaced_version if reply.HasField("replaced_version") else None
        return AdapterLoad(_adapter(reply.adapter), replaced, reply.unchanged)

    request = admin_pb2.LoadAdapterRequest(name=name, directory=directory)
    return _change("LoadAdapter", request, decode, timeout)


def _unload(name: str, in_flight: InFlight, timeout: float | None) -> Rpc:
    def decode(reply: admin_pb2.UnloadAdapterResponse) -> AdapterUnload:
        return AdapterUnload(_adapter(reply.adapter), reply.num_aborted)

    request = admin_pb2.UnloadAdapterRequest(name=name, in_flight=_IN_FLIGHT[in_flight])
    return _change("UnloadAdapter", request, decode, timeout)


def _list(page_token: str, timeout: float | None) -> Rpc:
    """One page: its adapters, and the token of the next page ("" for none)."""

    def decode(reply: admin_pb2.ListAdaptersResponse) -> Any:
        return [_adapter(adapter) for adapter in reply.adapters], reply.next_page_token

    request = admin_pb2.ListAdaptersRequest(page_token=page_token)
    return _change("ListAdapters", request, decode, timeout)


def _update(directory: str, in_flight: InFlightOfUpdate, timeout: float | None) -> Rpc:
    def decode(reply: admin_pb2.UpdateWeightsResponse) -> WeightsUpdate:
        return WeightsUpdate(
            reply.version, reply.digest, reply.numerics_id, reply.num_aborted, reply.num_kept,
            reply.pause.seconds + reply.pause.nanos / 1e9, reply.unchanged,
        )  # fmt: skip

    request = admin_pb2.UpdateWeightsRequest(directory=directory, in_flight=_IN_FLIGHT[in_flight])
    return _change("UpdateWeights", request, decode, timeout)


def _change(method: str, request: Any, decode: Any, timeout: float | None) -> Rpc:
    return Rpc(attrgetter(f"admin.{method}"), request, decode, timeout or CHANGE_TIMEOUT)


def _adapter(message: admin_pb2.Adapter) -> Adapter:
    return Adapter(**{name: getattr(message, name) for name in Adapter.__dataclass_fields__})


class AdminClient:
    """Changes what the server behind an admin port serves. One server: changes are not for several at once.

    Every method raises a `SalverError` when the call fails; nothing is changed then, but for an unload
    whose deadline passes while it waits: new calls are refused from its begin on. `timeout` is in
    seconds, 300 by default.
    """

    def __init__(self, address: Address = ADMIN_ADDRESS, options: ConnectionOptions | None = None) -> None:
        """As `Client`."""
        self._client = Client(address, options)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load_adapter(self, name: str, directory: str = "", *, timeout: float | None = None) -> AdapterLoad:
        """Serves the PEFT directory `directory` (by default `name`) of the server's --adapter-root under
        `name`, in the place of what was served under it. Calls that run go on with what they began with.

        Raises InvalidArgument for a bad one, naming the tensor or field, and ResourceExhausted.
        """
        done: AdapterLoad = self._client.call(_load(name, directory, timeout))
        return done

    def unload_adapter(
        self, name: str, in_flight: InFlight = "wait", *, timeout: float | None = None
    ) -> AdapterUnload:
        """Serves it no more, from now on; returns when its last call has ended, or was aborted. Raises
        NotFound."""
        done: AdapterUnload = self._client.call(_unload(name, in_flight, timeout))
        return done

    def list_adapters(self, *, timeout: float | None = None) -> list[Adapter]:
        """All of them, whatever the number of pages; also retired versions that calls still have."""
        adapters: list[Adapter] = []
        token = ""
        while True:
            page, token = self._client.call(_list(token, timeout))
            adapters += page
            if not token:
                return adapters

    def update_weights(
        self, directory: str, in_flight: InFlightOfUpdate = "wait", *, timeout: float | None = None
    ) -> WeightsUpdate:
        """Serves the weights of the checkpoint `directory` of the server's --weights-root in the place of
        the base's. Calls that run are waited for, aborted, or go on with the new weights ("keep").

        Raises InvalidArgument for bad ones, naming the tensor or field.
        """
        done: WeightsUpdate = self._client.call(_update(directory, in_flight, timeout))
        return done


class AsyncAdminClient:
    """`AdminClient`, asynchronous. Make it inside a running loop."""

    def __init__(self, address: Address = ADMIN_ADDRESS, options: ConnectionOptions | None = None) -> None:
        """As `AsyncClient`."""
        self._client = AsyncClient(address, options)

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def load_adapter(
        self, name: str, directory: str = "", *, timeout: float | None = None
    ) -> AdapterLoad:
        """See `AdminClient.load_adapter`."""
        done: AdapterLoad = await self._client.call(_load(name, directory, timeout))
        return done

    async def unload_adapter(
        self, name: str, in_flight: InFlight = "wait", *, timeout: float | None = None
    ) -> AdapterUnload:
        """See `AdminClient.unload_adapter`."""
        done: AdapterUnload = await self._client.call(_unload(name, in_flight, timeout))
        return done

    async def list_adapters(self, *, timeout: float | None = None) -> list[Adapter]:
        """See `AdminClient.list_adapters`."""
        adapters: list[Adapter] = []
        token = ""
        while True:
            page, token = await self._client.call(_list(token, timeout))
            adapters += page
            if not token:
                return adapters

    async def update_weights(
        self, directory: str, in_flight: InFlightOfUpdate = "wait", *, timeout: float | None = None
    ) -> WeightsUpdate:
        """See `AdminClient.update_weights`."""
        done: WeightsUpdate = await self._client.call(_update(directory, in_flight, timeout))
        return done
