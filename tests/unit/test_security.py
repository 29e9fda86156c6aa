"""Who may call: tokens and certificates over a real port, in this process, with a made-up engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.certificates import Authority, token_file
from support.fake_service import ANSWER, Service, failure, request, run, service, stream_request, until

from salver.client import AsyncClient, ConnectionOptions, Unauthenticated, Unavailable, token_from_file
from salver.server import reloading
from salver.server.config import ServerConfig
from salver.server.reloading import BadFile
from salver.v1 import model_pb2, tokenization_pb2

Code = grpc.StatusCode
INFO = model_pb2.GetServerInfoRequest()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(autouse=True)
def look_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "CHECK_SECONDS", 0.0)


def test_calls_need_a_token(tmp_path: Path) -> None:
    more = '[tenants.narrow]\nservices = ["TokenizationService"]\n'
    tokens = token_file(tmp_path / "tokens.toml", ("wide", "a"), ("thin", "narrow"), more=more)

    async def test() -> None:
        async with service(tokens=tokens) as served:
            assert (await served.models.GetServerInfo(INFO, metadata=bearer("wide"))).version
            refused = (
                (),
                bearer("other"),
                (("authorization", "wide"),),
                (("authorization", "Basic wide"),),
                (("authorization", "Bearer "),),
                (*bearer("wide"), *bearer("wide")),
                (("authorization-bin", b"Bearer wide"),),
            )
            for metadata in refused:
                code, details = await failure(served.models.GetServerInfo(INFO, metadata=metadata))
                assert (code, details["ErrorInfo"].reason) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
                assert "wide" not in details["message"]
            stream = served.generation.StreamGenerate(stream_request())
            assert (await failure(stream.read()))[0] is Code.UNAUTHENTICATED
            assert served.metric("salver_rejections_total", reason="unauthenticated") == len(refused) + 1
            # Of a scheme, the case does not matter.
            await served.models.GetServerInfo(INFO, metadata=(("authorization", "bearer wide"),))

            tokenize = tokenization_pb2.TokenizeRequest(text="abc")
            await served.tokenization.Tokenize(tokenize, metadata=bearer("thin"))
            await served.models.GetServerInfo(INFO, metadata=bearer("thin"))
            code, details = await failure(served.generation.Generate(request(), metadata=bearer("thin")))
            assert (code, details["ErrorInfo"].reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
            assert not served.engine.requests

            # Health needs none, reflection does.
            assert (await served.health.Check(health_pb2.HealthCheckRequest())).status == 1
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
            assert (await failure(reflection.ServerReflectionInfo(iter(ask)).read()))[
                0
            ] is Code.UNAUTHENTICATED
            answer = await reflection.ServerReflectionInfo(iter(ask), metadata=bearer("thin")).read()
            assert answer.list_services_response.service

    run(test)


def test_a_request_is_its_tenants(tmp_path: Path) -> None:
    """Name, weight and salt reach the engine; what was used is charged, and too much is refused."""
    more = "[tenants.a]\nweight = 2.5\ntokens_per_second = 0.001\nburst_tokens = 12\n"
    tokens = token_file(tmp_path / "tokens.toml", ("one", "a"), ("two", "b"), more=more)

    async def test() -> None:
        async with service(tokens=tokens) as served:
            salted = request()
            salted.cache_salt = "x"
            await served.generation.Generate(salted, metadata=bearer("one"))
            await served.generation.Generate(request(), metadata=bearer("two"))
            first, second = served.engine.requests
            assert (first.tenant, first.weight, first.cache_salt) == ("a", 2.5, "a\0x")
            assert (second.tenant, second.weight, second.cache_salt) == ("b", 1.0, "b\0")
            # 3 prompt and 6 output tokens of 12; then 18.
            await served.generation.Generate(request(), metadata=bearer("one"))
            code, details = await failure(served.generation.Generate(request(), metadata=bearer("one")))
            assert (code, details["ErrorInfo"].reason) == (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED")
            assert details["RetryInfo"].retry_delay.seconds == pytest.approx(6000, abs=2)
            assert served.metric("salver_rejections_total", reason="tenant_rate") == 1
            await served.models.GetServerInfo(INFO, metadata=bearer("one"))  # is free
            await served.generation.Generate(request(), metadata=bearer("two"))

    run(test)


def test_without_tokens_a_salt_is_what_the_request_says() -> None:
    async def test() -> None:
        async with service() as served:
            salted = request()
            salted.cache_salt = "x"
            await served.generation.Generate(salted, metadata=bearer("whatever"))
            assert (served.engine.requests[0].tenant, served.engine.requests[0].cache_salt) == ("", "x")

    run(test)


def test_tls_and_a_certificate_that_is_replaced(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    cert, key = old.issue("server")

    async def test() -> None:
        async with service(tls_cert=cert, tls_key=key) as served:

            def client(authority: Authority) -> AsyncClient:
                options = ConnectionOptions(tls=authority.client(), max_attempts=1, resume_attempts=0)
                return AsyncClient(served.address, options)

            async with client(old) as standing:
                assert (await standing.server_info()).version
                with pytest.raises(Unavailable):  # plaintext
                    await AsyncClient(served.address, ConnectionOptions(max_attempts=1)).server_info(
                        timeout=5
                    )
                with pytest.raises(Unavailable):  # another authority
                    await client(new).server_info(timeout=5)
                # A key without its certificate: the old pair stays in force.
                new_cert, new_key = new.issue("server")
                new_key.rename(key)
                async with client(old) as other:
                    assert (await other.server_info()).version
                assert served.metric("salver_reloads_total", what="tls", result="bad") == 1
                new_cert.rename(cert)
                async with client(new) as other:
                    assert (await other.server_info()).version
                assert served.metric("salver_reloads_total", what="tls", result="good") == 1
                with pytest.raises(Unavailable):
                    await client(old).server_info(timeout=5)
                assert (await standing.server_info()).version  # a connection outlives its certificate

    run(test)


def test_mutual_tls(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    cert, key = ours.issue("server")
    tokens = token_file(tmp_path / "tokens.toml", ("one", "a"))

    async def test() -> None:
        config = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ours.ca, "health_port": 0}
        async with service(tokens=tokens, **config) as served:

            async def ask(token: str | None, authority: Authority, name: str | None) -> str:
                made = authority.client(name)
                tls = type(made)(ours.ca, made.cert, made.key)
                options = ConnectionOptions(tls=tls, token=token, max_attempts=1)
                async with AsyncClient(served.address, options) as client:
                    return (await client.server_info(timeout=5)).version

            assert await ask("one", ours, "client")
            with pytest.raises(Unauthenticated):
                await ask(None, ours, "client")
            for authority, name in ((ours, None), (theirs, "client")):
                with pytest.raises(Unavailable):
                    await ask("one", authority, name)

            # Probes, which have neither, have a port of their own, with nothing else on it.
            address = await served.rpc.open_health_port()
            assert address
            async with grpc.aio.insecure_channel(address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
                unknown = channel.unary_unary("/salver.v1.ModelService/GetServerInfo")
                assert (await failure(unknown(b"")))[0] is Code.UNIMPLEMENTED
                watch = health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
                assert (await watch.read()).status == 1
                served.rpc.health.set_ready(False)
                assert (await watch.read()).status == 2

    run(test)


@pytest.mark.parametrize("broken", ["cert", "key", "ca", "other key", "none"])
def test_certificates_that_cannot_be_used(broken: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    ca = authority.ca
    if broken == "other key":
        _, key = authority.issue("other")
    elif broken == "none":
        cert = tmp_path / "none.pem"
    else:
        {"cert": cert, "key": key, "ca": ca}[broken].write_text("-----BEGIN NOTHING-----\n")

    async def test() -> None:
        with pytest.raises(BadFile, match="--tls-client-ca" if broken == "ca" else "--tls-cert"):
            Service(tls_cert=cert, tls_key=key, tls_client_ca=ca)

    run(test)


def test_the_client_reads_its_token_for_every_call(tmp_path: Path) -> None:
    file, mine = token_file(tmp_path / "tokens.toml", ("one", "a")), tmp_path / "mine"
    mine.write_text("one\n")

    async def test() -> None:
        async with service(tokens=file) as served:
            options = ConnectionOptions(token=token_from_file(mine))
            async with AsyncClient(served.address, options) as client:
                assert (await client.generate("abc", temperature=0, max_tokens=3)).completions
                token_file(file, ("two", "a"))
                with pytest.raises(Unauthenticated):
                    await client.server_info()
                mine.write_text("two\n")
                async with client.stream_generate("abc", temperature=0, max_tokens=4) as stream:
                    assert [d async for d in stream]
                assert stream.result.completions[0].token_ids == tuple(ANSWER[:4])
                await until(lambda: not served.engine.running)

    run(test)


def test_no_secret_is_shown_of_the_options() -> None:
    options = ConnectionOptions(token="hunter2", metadata=(("authorization", "Bearer hunter3"),))
    assert "hunter" not in repr(options)


def test_both_sides_agree_on_the_size_of_a_message() -> None:
    """The defaults are one figure; a message beyond is refused by name, and the connection goes on."""
    assert ServerConfig(model="m").max_message_size == ConnectionOptions().max_message_bytes

    async def test() -> None:
        async with service(max_message_size=20_000) as served:
            info = await served.models.GetServerInfo(INFO)
            assert info.limits.max_message_bytes == 20_000
            code, details = await failure(served.generation.Generate(request("x" * 20_000)))
            assert code is Code.RESOURCE_EXHAUSTED and "larger than max" in details["message"]
            await served.models.GetServerInfo(INFO)

    run(test)
