"""UpdateWeights over real ports, with an engine that makes up its tokens: who waits, who is told what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fake_service import (
    Code,
    Service,
    failure,
    fields_of,
    request,
    run,
    service,
    stream_request,
    until,
)

from salver.server.engine.changes import Refusal
from salver.server.engine.errors import ChangeRefused, EngineUnavailable
from salver.v1 import admin_pb2, model_pb2


def write(root: Path, name: str) -> Path:
    (root / name).mkdir()
    (root / name / "model.safetensors").write_bytes(name.encode())
    return root / name


def update(directory: str, mode: Any = admin_pb2.IN_FLIGHT_WAIT) -> admin_pb2.UpdateWeightsRequest:
    return admin_pb2.UpdateWeightsRequest(directory=directory, in_flight=mode)


def changeable(root: Path) -> Any:
    return service(admin_port=0, weights_root=root, cache_dir=root / "cache")


async def started_stream(served: Service) -> Any:
    served.engine.pause_at = 2
    stream = served.generation.StreamGenerate(stream_request(max_tokens=50))
    await stream.read()
    return stream


def test_an_update_waits_and_holds_what_comes(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            stream = await started_stream(served)
            updating = asyncio.ensure_future(reply_of(served.admin.UpdateWeights(update("one"))))
            await until(lambda: served.front._held)
            coming = asyncio.ensure_future(reply_of(served.generation.Generate(request())))
            info = await served.models.GetServerInfo(model_pb2.GetServerInfoRequest())
            assert (info.weights_version, info.numerics_id) == (1, "numerics-1"), "is not held up"
            assert not updating.done() and not served.engine.config.weights
            served.engine.pause_at = None
            stream.cancel()
            done = await updating
            assert (done.version, done.num_aborted, done.num_kept, done.unchanged) == (2, 0, 0, False)
            assert done.pause.ToMilliseconds() == 500 and done.numerics_id == f"bits-{done.digest[:8]}"
            answer = await coming
            assert (answer.weights_version, answer.numerics_id) == (2, done.numerics_id)
            config = served.engine.config
            assert (config.weights, config.weights_digest) == (str(tmp_path / "one"), done.digest)
            (model,) = (await served.models.ListModels(model_pb2.ListModelsRequest())).models
            assert (model.weights_version, model.weights_digest) == (2, done.digest)
            assert served.metric("salver_weights_version") == 2
            again = await served.admin.UpdateWeights(update("one"))
            assert again.unchanged and again.version == 2

    run(test)


async def reply_of(call: Any) -> Any:
    return await call


def test_an_update_that_is_given_up_lets_all_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            stream = await started_stream(served)
            updating = asyncio.ensure_future(reply_of(served.admin.UpdateWeights(update("one"))))
            await until(lambda: served.front._held)
            coming = asyncio.ensure_future(reply_of(served.generation.Generate(request())))
            updating.cancel()
            served.engine.pause_at = None
            assert (await coming).weights_version == 1
            await until(lambda: served.engine.staged is None)
            assert served.front.model.weights_version == 1 and not stream.done()
            stream.cancel()

    run(test)


def test_a_held_call_is_told_of_a_drain(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            stream = await started_stream(served)
            updating = asyncio.ensure_future(failure(served.admin.UpdateWeights(update("one"))))
            await until(lambda: served.front._held)
            coming = asyncio.ensure_future(failure(served.generation.Generate(request())))
            await until(lambda: served.rpc._calls.num_running == 2)
            served.front.drain()
            assert (await coming)[0] is Code.UNAVAILABLE
            stream.cancel()
            served.engine.unavailable = EngineUnavailable("gone")
            assert (await updating)[0] is Code.UNAVAILABLE

    run(test)


def test_calls_are_aborted(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            stream = await started_stream(served)
            done = await served.admin.UpdateWeights(update("one", admin_pb2.IN_FLIGHT_ABORT))
            assert (done.version, done.num_aborted) == (2, 1)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while True:
                    await stream.read()
            assert ended.value.code() is Code.ABORTED

    run(test)


def test_kept_calls_promise_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            served.engine.may_load.clear()
            stream = await started_stream(served)
            updating = asyncio.ensure_future(
                reply_of(served.admin.UpdateWeights(update("one", admin_pb2.IN_FLIGHT_KEEP)))
            )
            await until(lambda: served.front.model.in_force.version == 2)
            served.engine.may_load.set()
            done = await updating
            assert (done.version, done.num_kept) == (2, 1)
            served.engine.pause_at = None
            fresh = await served.generation.Generate(request())
            assert (fresh.weights_version, fresh.numerics_id) == (2, done.numerics_id)
            stream.cancel()

    run(test)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        (tmp_path / "empty").mkdir()
        async with changeable(tmp_path) as served:
            for directory in ("..", "/etc", "none", "empty"):
                code, details = await failure(served.admin.UpdateWeights(update(directory)))
                assert code is Code.INVALID_ARGUMENT and fields_of(details) == ["directory"]
            assert (await failure(served.admin.UpdateWeights(update("one", 9))))[0] is Code.INVALID_ARGUMENT
            told = f"{tmp_path}/one/model.safetensors: tensor q has shape [1]"
            served.engine.refusal = ChangeRefused(told, Refusal.INVALID)
            code, details = await failure(served.admin.UpdateWeights(update("one")))
            assert code is Code.INVALID_ARGUMENT and "one/model.safetensors: tensor q" in details["message"]
            served.engine.refusal = None
            served.engine.unavailable = EngineUnavailable("the worker died")
            keep = update("one", admin_pb2.IN_FLIGHT_KEEP)
            assert (await failure(served.admin.UpdateWeights(keep)))[0] is Code.UNAVAILABLE
            served.engine.unavailable = None
            answer = await served.generation.Generate(request())
            assert (answer.weights_version, answer.numerics_id) == (1, "numerics-1")
            assert not served.engine.config.weights and served.engine.staged is None

    run(test)


def test_weights_of_a_worker_that_was_restarted_meanwhile(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one")
        async with changeable(tmp_path) as served:
            stream = await started_stream(served)
            updating = asyncio.ensure_future(failure(served.admin.UpdateWeights(update("one"))))
            await until(lambda: served.front._held)
            served.engine.restarts += 1
            stream.cancel()
            assert (await updating)[0] is Code.UNAVAILABLE
            assert served.front.model.weights_version == 1 == served.front.model.in_force.version

    run(test)


def test_without_a_root_nothing_is_replaced() -> None:
    async def test() -> None:
        async with service(admin_port=0) as served:
            code, details = await failure(served.admin.UpdateWeights(update("one")))
            assert code is Code.FAILED_PRECONDITION and "--weights-root" in details["message"]

    run(test)
