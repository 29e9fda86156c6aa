"""Loading, draining and health over a real port, and reflection."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.fake_service import (
    NOT_SERVING,
    SERVING,
    Code,
    Service,
    failure,
    request,
    run,
    score_input,
    service,
    stream_request,
    until,
)

from salver.server.engine.process import EngineState
from salver.server.rpc.server import SERVICES
from salver.v1 import (
    generation_pb2,
)


async def health_of(served: Service, name: str = "") -> int:
    reply = await served.health.Check(health_pb2.HealthCheckRequest(service=name))
    return int(reply.status)


def test_loading() -> None:
    async def test() -> None:
        async with service(loading=True) as served:
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.UNAVAILABLE and details["pushback"] and "RetryInfo" in details
            assert [await health_of(served, n) for n in ("", "readiness", "liveness")] == [
                NOT_SERVING, NOT_SERVING, SERVING,
            ]  # fmt: skip
            served.serve()
            await served.generation.Generate(request())
            for name in ("", "readiness", "liveness", *SERVICES):
                assert await health_of(served, name) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_of(served, "nobody")
            assert caught.value.code() is Code.NOT_FOUND

    run(test)


def test_health_follows_the_engine_and_every_watcher_hears_of_it() -> None:
    async def test() -> None:
        async with service() as served:
            asked = health_pb2.HealthCheckRequest()
            first, second = served.health.Watch(asked), served.health.Watch(asked)
            assert [(await w.read()).status for w in (first, second)] == [SERVING, SERVING]
            first.cancel()  # must not cost the second watcher its news
            await asyncio.sleep(0.02)
            served.rpc.health.set_engine_state(EngineState.STALLED)
            assert (await second.read()).status == NOT_SERVING
            assert await health_of(served, "liveness") == NOT_SERVING
            served.rpc.health.set_engine_state(EngineState.RESTARTING)
            assert await health_of(served, "liveness") == SERVING
            assert await health_of(served, SERVICES[0]) == NOT_SERVING
            served.rpc.health.set_engine_state(EngineState.SERVING)
            assert (await second.read()).status == SERVING
            unknown = served.health.Watch(health_pb2.HealthCheckRequest(service="later"))
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

    run(test)


def test_a_drain_lets_streams_finish() -> None:
    async def test() -> None:
        async with service() as served:
            served.engine.hold.clear()
            running = served.generation.StreamGenerate(stream_request(max_tokens=20))
            await until(lambda: served.engine.requests)
            draining = asyncio.ensure_future(served.rpc.drain())
            await until(lambda: served.rpc.health.status("") == NOT_SERVING)
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.UNAVAILABLE and details["pushback"]
            assert await health_of(served, "liveness") == SERVING
            assert not draining.done()
            served.engine.hold.set()
            tokens = [t async for m in running for d in m.completions for t in d.token_ids]
            assert len(tokens) == 20
            await draining

    run(test)


def test_a_drain_has_an_end() -> None:
    async def test() -> None:
        async with service(drain_period=0.05) as served:
            served.engine.hold.clear()
            running = served.generation.StreamGenerate(stream_request())
            scoring = served.generation.Score(generation_pb2.ScoreRequest(inputs=[score_input("a", "b")]))
            await until(lambda: len(served.engine.requests) == 2)
            await served.rpc.drain()
            for call in (running.read(), scoring):
                code, details = await failure(call)
                assert code is Code.UNAVAILABLE and details["pushback"]

    run(test)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(version: str) -> None:
    async def test() -> None:
        async with service() as served:
            ask = served.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            symbol = f"grpc.reflection.{version}.ServerReflection"
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="salver.v1.GenerationService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
            ]
            listed, ours, own = [reply async for reply in ask(iter(requests))]
            names = {s.name for s in listed.list_services_response.service}
            assert names >= {*SERVICES, "grpc.health.v1.Health", symbol}
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in ours.file_descriptor_response.file_descriptor_proto
            ]
            assert {f.name for f in files} >= {"salver/v1/generation.proto", "salver/v1/common.proto"}
            (file,) = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in own.file_descriptor_response.file_descriptor_proto
            ]
            assert file.package == f"grpc.reflection.{version}"
            assert [service.name for service in file.service] == ["ServerReflection"]
            messages = {field.type_name for message in file.message_type for field in message.field}
            assert {name.rpartition(".")[0] for name in messages if name} == {f".grpc.reflection.{version}"}

    run(test)
