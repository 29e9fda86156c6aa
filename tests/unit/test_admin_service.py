"""AdminService over real ports, with an engine that makes up its tokens: adapters' life, and who may call."""

from __future__ import annotations

import asyncio
import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import Authority
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

from salver.client import AsyncAdminClient, ConnectionOptions, Unavailable
from salver.server.config import ServerConfig, parse_config
from salver.server.engine.changes import AdapterFacts, Refusal
from salver.server.engine.errors import ChangeRefused
from salver.server.engine.request import Ready
from salver.server.log import JsonFormatter
from salver.server.metrics_compat import exposed
from salver.v1 import admin_pb2, admin_pb2_grpc, model_pb2

TOKEN = "salver_right"


def write(root: Path, directory: str, digest: str) -> None:
    (root / directory).mkdir(exist_ok=True)
    (root / directory / "digest").write_text(digest)


def token_file(path: Path) -> Path:
    path.write_text(f'[[tokens]]\nsha256 = "{sha256(TOKEN.encode()).hexdigest()}"\ntenant = "trainer"\n')
    return path


def load(name: str, directory: str = "") -> admin_pb2.LoadAdapterRequest:
    return admin_pb2.LoadAdapterRequest(name=name, directory=directory)


def unload(name: str, mode: Any = admin_pb2.IN_FLIGHT_WAIT) -> admin_pb2.UnloadAdapterRequest:
    return admin_pb2.UnloadAdapterRequest(name=name, in_flight=mode)


def asking(name: str) -> Any:
    asked = stream_request(max_tokens=50)
    asked.model = name
    return asked


async def listed(served: Service) -> list[tuple[str, int, bool, int]]:
    reply = await served.admin.ListAdapters(admin_pb2.ListAdaptersRequest())
    return [(a.name, a.version, a.retired, a.num_running) for a in reply.adapters]


async def models(served: Service) -> list[str]:
    return [m.name for m in (await served.models.ListModels(model_pb2.ListModelsRequest())).models]


def test_an_adapter_is_loaded_asked_replaced_and_freed(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1" * 32)
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            asked = request()
            asked.model = "polite"
            assert (await failure(served.generation.Generate(asked)))[0] is Code.NOT_FOUND
            done = await served.admin.LoadAdapter(load("polite", "one"))
            assert (done.adapter.name, done.adapter.version, done.adapter.rank) == ("polite", 1, 4)
            assert not done.HasField("replaced_version")
            assert await models(served) == ["tiny", "polite"]
            first = await served.generation.Generate(asked)
            assert first.model == "polite" and first.numerics_id == "numerics-1+" + ("d1" * 32)[:16]
            served.engine.pause_at = 2
            stream = served.generation.StreamGenerate(asking("polite"))
            await stream.read()
            write(tmp_path, "one", "d2" * 32)
            done = await served.admin.LoadAdapter(load("polite", "one"))
            assert (done.adapter.version, done.replaced_version) == (2, 1)
            assert await listed(served) == [("polite", 1, True, 1), ("polite", 2, False, 0)]
            assert served.engine.adapters == {"polite@1", "polite@2"}
            served.engine.pause_at = None
            second = await served.generation.Generate(asked)
            assert second.numerics_id == "numerics-1+" + ("d2" * 32)[:16]
            assert served.engine.adapters == {"polite@1", "polite@2"}, "kept for the stream"
            stream.cancel()
            await until(lambda: served.engine.adapters == {"polite@2"})
            assert await listed(served) == [("polite", 2, False, 0)]
            assert [s.key for s in served.engine.config.adapters] == ["polite@2"]
            assert served.engine.config.adapters[0].digest == "d2" * 32
            again = await served.admin.LoadAdapter(load("polite", "one"))
            assert again.unchanged and again.adapter.version == 2 and not again.HasField("replaced_version")
            assert served.engine.adapters == {"polite@2"}

    run(test)


@pytest.mark.parametrize("abort", [False, True])
def test_an_unload_waits_for_its_calls_or_aborts_them(tmp_path: Path, abort: bool) -> None:
    async def test() -> None:
        write(tmp_path, "polite", "d1")
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            await served.admin.LoadAdapter(load("polite"))
            served.engine.pause_at = 2
            stream = served.generation.StreamGenerate(asking("polite"))
            base = served.generation.StreamGenerate(asking(""))
            await stream.read()
            await base.read()
            mode = admin_pb2.IN_FLIGHT_ABORT if abort else admin_pb2.IN_FLIGHT_WAIT
            unloading = served.admin.UnloadAdapter(unload("polite", mode))
            done = asyncio.ensure_future(unloading)
            await until(lambda: not served.front.model.adapters)
            assert (await failure(served.generation.StreamGenerate(asking("polite")).read()))[
                0
            ] is Code.NOT_FOUND
            if abort:
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    while True:
                        await stream.read()
                assert ended.value.code() is Code.ABORTED
                assert (await done).num_aborted == 1
            else:
                assert await listed(served) == [("polite", 1, True, 1)]
                assert not done.done()
                stream.cancel()
                assert (await done).num_aborted == 0
            await until(lambda: not served.engine.adapters)
            assert await listed(served) == [] and served.engine.config.adapters == ()
            assert not base.done(), "the base's calls are nobody's business"
            base.cancel()
            assert (await failure(served.admin.UnloadAdapter(unload("polite"))))[0] is Code.NOT_FOUND

    run(test)


def test_a_call_that_has_not_begun_is_aborted_too(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "polite", "d1")
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            await served.admin.LoadAdapter(load("polite"))
            reading = asyncio.Event()
            read = served.rpc._prompts.prompt

            async def held(*arguments: Any) -> Any:
                await reading.wait()
                return await read(*arguments)

            served.rpc._prompts.prompt = held  # type: ignore[method-assign]
            stream = served.generation.StreamGenerate(asking("polite"))
            waiting = asyncio.ensure_future(failure(stream.read()))
            await until(lambda: served.front.calls("polite@1"))
            done = asyncio.ensure_future(
                reply_of(served.admin.UnloadAdapter(unload("polite", admin_pb2.IN_FLIGHT_ABORT)))
            )
            await until(lambda: not served.front.model.adapters)
            reading.set()
            code, details = await waiting
            assert code is Code.ABORTED and details["ErrorInfo"].reason == "ADAPTER_UNLOADED"
            assert (await done).num_aborted == 1

    run(test)


async def reply_of(call: Any) -> Any:
    return await call


@pytest.mark.parametrize(
    "directory",
    ["..", ".", "../one", "one/../one", "/etc", "one/", "", "a" * 129, "\x00", "out", "linked", "none"],
)
def test_a_folder_is_a_name_under_the_root(tmp_path: Path, directory: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    write(root, "one", "d1")
    write(outside, "secret", "d1")
    (root / "out").symlink_to(outside / "secret")
    (root / "linked").mkdir()
    (root / "linked" / "digest").symlink_to(outside / "secret" / "digest")
    (root / "inside").symlink_to(root / "one")

    async def test() -> None:
        async with service(admin_port=0, adapter_root=root) as served:
            asked = load("polite", directory) if directory else load("..")
            code, details = await failure(served.admin.LoadAdapter(asked))
            assert code is Code.INVALID_ARGUMENT
            assert fields_of(details) == (["directory"] if directory else ["name"])
            assert str(outside) not in details["message"] and served.engine.adapters == set()
            assert (await served.admin.LoadAdapter(load("polite", "inside"))).adapter.version == 1

    run(test)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1")
        async with service(admin_port=0, adapter_root=tmp_path, max_adapters=2) as served:
            await served.admin.LoadAdapter(load("a", "one"))
            path = f"{tmp_path}/one/adapter_model.safetensors"
            for refusal, code in ((Refusal.INVALID, Code.INVALID_ARGUMENT), (Refusal.BUG, Code.INTERNAL),
                                  (Refusal.MEMORY, Code.RESOURCE_EXHAUSTED),
                (Refusal.UNSUPPORTED, Code.FAILED_PRECONDITION)):  # fmt: skip
                served.engine.refusal = ChangeRefused(f"{path}: tensor q.lora_A is missing", refusal)
                found, details = await failure(served.admin.LoadAdapter(load("a", "one")))
                assert found is code
                if refusal is Refusal.INVALID:
                    assert "one/adapter_model.safetensors: tensor q.lora_A" in details["message"]
                    assert str(tmp_path) not in details["message"]
            served.engine.refusal = None
            assert await listed(served) == [("a", 1, False, 0)] and served.engine.adapters == {"a@1"}
            assert (await failure(served.admin.LoadAdapter(load("tiny", "one"))))[0] is Code.INVALID_ARGUMENT
            await served.admin.LoadAdapter(load("b", "one"))
            found, details = await failure(served.admin.LoadAdapter(load("c", "one")))
            assert found is Code.RESOURCE_EXHAUSTED
            assert details["ErrorInfo"].metadata["limit"] == details["ErrorInfo"].metadata["served"] == "2"
            write(tmp_path, "one", "d2")
            assert (await served.admin.LoadAdapter(load("b", "one"))).HasField("replaced_version")
            keep = admin_pb2.UnloadAdapterRequest(name="a", in_flight=77)
            assert fields_of((await failure(served.admin.UnloadAdapter(keep)))[1]) == ["in_flight"]

    run(test)


def test_a_cancelled_load_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1")
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            served.engine.may_load.clear()
            loading = asyncio.ensure_future(reply_of(served.admin.LoadAdapter(load("a", "one"))))
            await until(lambda: served.engine.adapters)
            loading.cancel()
            await until(lambda: not served.engine.adapters)
            assert await listed(served) == []
            served.engine.may_load.set()
            await served.admin.LoadAdapter(load("a", "one"))

    run(test)


def test_pages_go_on_where_they_ended(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1")
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            for name in "cab":
                await served.admin.LoadAdapter(load(name, "one"))
            found, token = [], ""
            while True:
                asked = admin_pb2.ListAdaptersRequest(page_size=2, page_token=token)
                page = await served.admin.ListAdapters(asked)
                found.append([a.name for a in page.adapters])
                token = page.next_page_token
                if not token:
                    break
                await served.admin.UnloadAdapter(unload("b"))  # the last one of the page
            assert found == [["a", "b"], ["c"]] and page.max_adapters == 16
            asked = admin_pb2.ListAdaptersRequest(page_token="x", page_size=1001)
            assert fields_of((await failure(served.admin.ListAdapters(asked)))[1]) == [
                "page_size",
                "page_token",
            ]

    run(test)


def test_what_a_new_worker_could_not_load_is_served_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1")
        async with service(admin_port=0, adapter_root=tmp_path) as served:
            for name in "ab":
                await served.admin.LoadAdapter(load(name, "one"))
            kept = AdapterFacts("a@1", "d1", 4, 1000)
            forgotten = AdapterFacts("c@3", "d1", 4, 1000)
            served.engine.adapters = {"a@1", "c@3"}
            ready = Ready(
                "cpu", "float32", "torch", "2.13", "numerics-1", 1234, 17, 16, 200, 8, 64, (),
                adapters=(kept, forgotten), lost_adapters=(("b@2", "the files have changed"),),
            )  # fmt: skip
            ((lost, reason),) = served.rpc.adapters.restarted(ready)
            assert lost.name == "b" and "changed" in reason
            assert await models(served) == ["tiny", "a"] and served.engine.adapters == {"a@1"}
            assert [s.key for s in served.engine.config.adapters] == ["a@1"]
            assert served.rpc.adapters.restarted(ready) == []

    run(test)


def test_who_may_call_and_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "salver.audit")

    async def test() -> None:
        write(tmp_path, "one", "d1")
        tokens = token_file(tmp_path / "tokens")
        async with service(admin_port=0, adapter_root=tmp_path, admin_token_file=tokens) as served:
            for metadata in ((), (("authorization", "Bearer salver_wrong"),)):
                call = served.admin.LoadAdapter(load("a", "one"), metadata=metadata)
                assert (await failure(call))[0] is Code.UNAUTHENTICATED
            assert served.engine.adapters == set()
            right = (("authorization", f"Bearer {TOKEN}"),)
            await served.admin.LoadAdapter(load("a", "one"), metadata=right)
            public = admin_pb2_grpc.AdminServiceStub(served.channel)
            call = public.ListAdapters(admin_pb2.ListAdaptersRequest(), metadata=right)  # type: ignore[attr-defined]
            assert (await failure(call))[0] is Code.UNIMPLEMENTED
            health = health_pb2_grpc.HealthStub(served.admin_channel)
            name = "salver.v1.AdminService"
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            assert (await failure(served.health.Check(health_pb2.HealthCheckRequest(service=name))))[
                0
            ] is Code.NOT_FOUND
            handled = served.metric("grpc_server_handled_total", grpc_method="LoadAdapter", grpc_code="OK")
            assert handled == 1

    run(test)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    told = [(line["caller"], line.get("adapter", ""), line["code"]) for line in lines]
    assert told == [("anybody", "", "UNAUTHENTICATED")] * 2 + [("trainer", "a", "OK")]
    assert lines[2]["version"] == 1 and lines[2]["peer"] and lines[2]["method"].endswith("/LoadAdapter")
    assert "salver_" not in json.dumps(lines), "no token"


def test_the_admin_port_has_certificates_of_its_own(tmp_path: Path) -> None:
    theirs, ours = Authority(tmp_path / "theirs"), Authority(tmp_path / "ours")
    cert, key = ours.issue("server")

    async def test() -> None:
        flags = {"admin_tls_cert": cert, "admin_tls_key": key, "admin_tls_client_ca": ours.ca}
        async with service(admin_port=0, **flags) as served:
            call = served.admin.ListAdapters(admin_pb2.ListAdaptersRequest())
            assert (await failure(call))[0] is Code.UNAVAILABLE, "plaintext"
            for tls, is_good in (
                (ours.client("trainer"), True),
                (ours.client(), False),
                (theirs.client("x"), False),
            ):
                async with AsyncAdminClient(
                    served.admin_address, ConnectionOptions(tls=tls, max_attempts=1)
                ) as client:
                    if is_good:
                        assert await client.list_adapters() == []
                    else:
                        with pytest.raises(Unavailable):
                            await client.list_adapters()
            assert (await served.generation.Generate(request())).model == "tiny", "the other port as before"

    run(test)


def test_without_a_root_nothing_can_be_loaded() -> None:
    async def test() -> None:
        async with service(admin_port=0) as served:
            code, details = await failure(served.admin.LoadAdapter(load("a")))
            assert code is Code.FAILED_PRECONDITION and "--adapter-root" in details["message"]

    run(test)


def test_a_gateway_sees_who_runs_with_what(tmp_path: Path) -> None:
    async def test() -> None:
        write(tmp_path, "one", "d1")
        async with service(admin_port=0, adapter_root=tmp_path, max_adapters=4) as served:
            for name in "ab":
                await served.admin.LoadAdapter(load(name, "one"))
            served.engine.pause_at = 2
            streams = [served.generation.StreamGenerate(asking(name)) for name in ("b", "a", "a", "")]
            for stream in streams:
                await stream.read()
            theirs = {
                sample.name: (sample.labels, sample.value)
                for family in exposed(served.metrics.registry, "vllm").collect()
                for sample in family.samples
            }
            labels, value = theirs["vllm:lora_requests_info"]
            assert labels["running_lora_adapters"] == "a,b" and labels["waiting_lora_adapters"] == ""
            assert labels["max_lora"] == "4" and value > 1.7e9
            assert served.metric("salver_adapter_requests_running", adapter="a") == 2
            assert served.metric("salver_adapter_requests_waiting", adapter="b") == 0
            assert served.metric("salver_adapters") == 2 and served.metric("salver_adapters_retired") == 0
            for stream in streams:
                stream.cancel()
            await until(lambda: not served.engine.running)

    run(test)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--admin-port 0 --admin-host 0.0.0.0", "--admin-token-file"),
        ("--admin-port 0 --admin-host ::", "--admin-token-file"),
        ("--admin-port 0 --admin-host admin.example", "--admin-token-file"),
        ("--admin-token-file t", "--admin-port"),
        ("--adapter-root .", "--admin-port"),
        ("--admin-port 0 --max-adapters 3", "--adapter-root"),
        ("--admin-port 0 --admin-tls-key k", "--admin-tls-cert"),
        ("--admin-port 0 --admin-tls-client-ca k", "--admin-tls-cert"),
        ("--admin-port 50051", "--port"),
    ],
)
def test_flags_that_would_do_harm_or_nothing(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(["m", *flags.split()], {})
    assert told in capsys.readouterr().err


def test_the_admin_port_takes_over_the_main_ones_certificates() -> None:
    def of(*flags: str) -> ServerConfig:
        return parse_config(["m", "--admin-port", "0", *flags], {})

    assert of().admin_tls == (None, None, None, "--tls") and not of().admin_is_open
    main = ("--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a")
    assert of(*main).admin_tls == (Path("c"), Path("k"), Path("a"), "--tls")
    own = ("--admin-tls-cert", "d", "--admin-tls-key", "l")
    assert of(*main, *own).admin_tls == (Path("d"), Path("l"), None, "--admin-tls")
    assert of("--admin-host", "::", "--admin-token-file", "t").admin_is_open
