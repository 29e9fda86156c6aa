"""A real server with mutual TLS, tokens and a port for probes: the command line, the cache, the log."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import Authority, token_file
from support.serving import SALVER, Server, wait_until

from salver.client import Client, ConnectionOptions, InvalidArgument, SalverError, Unauthenticated

ALICE, EVE = "salver_alice-0123456789", "salver_eve-0123456789"
SECRET = "thexyzzysecret"  # in every part of a request


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tokens(authority: Authority) -> Path:
    return token_file(authority.directory / "tokens.toml", (ALICE, "alice"), (EVE, "eve"))


@pytest.fixture(scope="module")
def guarded(
    start_module_server: Callable[..., Server], tiny_llama: Path, authority: Authority, tokens: Path
) -> Server:
    cert, key = authority.issue("server")
    config = authority.directory / "salver.toml"
    flags = {"tls-cert": cert, "tls-key": key, "tls-client-ca": authority.ca, "tokens": tokens}
    lines = [f"{name} = {json.dumps(str(value))}" for name, value in flags.items()]
    config.write_text("\n".join([*lines, "health-port = 0", 'log-level = "debug"']))
    return start_module_server(tiny_llama, "--config", str(config))


def client(server: Server, authority: Authority, token: str) -> Client:
    return Client(server.address, ConnectionOptions(tls=authority.client("client"), token=token))


def test_a_probe_needs_neither_certificate_nor_token(guarded: Server) -> None:
    assert "calls need mTLS and tokens" in guarded.lines
    (address,) = re.findall(r"^health on (\S+)$", guarded.log, re.MULTILINE)
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("readiness", "liveness"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status == 1


def test_the_command_line(guarded: Server, authority: Authority, tmp_path: Path) -> None:
    tls = authority.client("cli")
    (tmp_path / "token").write_text(ALICE + "\n")
    flags = [f"--tls-ca={tls.ca}", f"--tls-cert={tls.cert}", f"--tls-key={tls.key}"]

    def salver(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [SALVER, *words, "--address", guarded.address]
        environment = {**os.environ, **environ}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    done = salver("generate", "hello", "--max-tokens=3", f"--token-file={tmp_path / 'token'}", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    by_variables = {
        f"SALVER_TLS_{n.upper()}": str(v) for n, v in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key))
    }
    assert salver("health", **by_variables).stdout == "SERVING\n"
    assert salver("models", SALVER_TOKEN=EVE, **by_variables).returncode == 0
    done = salver("models", *flags)
    assert done.returncode == 1 and "a token is needed" in done.stderr
    done = salver("models", *flags, "--token-file=/none")
    assert done.returncode == 2 and "--token-file /none" in done.stderr
    done = salver("models", f"--tls-cert={tls.cert}")
    assert done.returncode == 2 and "needs its key" in done.stderr
    done = salver("models", "--tls-ca=/none")
    assert done.returncode == 2 and "--tls-ca" in done.stderr


def test_deploy_check(guarded: Server, authority: Authority, tmp_path: Path) -> None:
    """It finds what is well, and what is not: a grace too short, no metrics, no certificate."""
    tls = authority.client("checker")
    (tmp_path / "token").write_text(ALICE)
    flags = [f"--tls-ca={tls.ca}", f"--tls-cert={tls.cert}", f"--tls-key={tls.key}"]
    flags.append(f"--token-file={tmp_path / 'token'}")

    def check(*words: str) -> tuple[int, dict[str, tuple[str, str]]]:
        command = [SALVER, "deploy-check", guarded.address, "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, {f["check"]: (f["status"], f["detail"]) for f in json.loads(done.stdout)}

    metrics = f"--metrics={guarded.metrics_url}"
    code, findings = check(*flags, metrics, "--grace=40", "--watch=1", "--streams=2")
    assert code == 0 and {status for status, _ in findings.values()} == {"ok"}, findings
    assert "GenerationService" in findings["reflection"][1] and "TLSv1.3" in findings["tls"][1]
    assert "0 lost" in findings["rolling restart"][1]
    code, findings = check(*flags, "--metrics=http://127.0.0.1:1/metrics", "--grace=39")
    assert (code, findings["drain"][0], findings["metrics"][0]) == (1, "FAIL", "FAIL")
    code, findings = check(*flags[:1])
    assert (code, findings["health: readiness"][0]) == (1, "FAIL")


def test_tenants_share_no_prefix(guarded: Server, authority: Authority) -> None:
    """What the cache tells of another tenant's prompts is nothing, whatever salt is asked for."""
    prompt = list(range(3, 60))
    with client(guarded, authority, ALICE) as alice, client(guarded, authority, EVE) as eve:

        def cached(of: Client, **options: str) -> int:
            return of.generate(prompt, max_tokens=1, temperature=0, **options).usage.cached_tokens

        assert cached(alice) == 0
        assert cached(alice) >= 48
        assert cached(eve) == cached(eve, cache_salt="alice") == cached(eve, cache_salt="alice\0") == 0
        assert cached(eve) >= 48
        assert cached(alice, cache_salt="mine") == 0


def test_no_secret_and_no_prompt_is_in_the_log(guarded: Server, authority: Authority, tokens: Path) -> None:
    """At the level `debug`, of calls that succeed and of calls that fail in every way that quotes."""
    with client(guarded, authority, ALICE) as alice:
        alice.generate(SECRET, max_tokens=3, stop=[SECRET])
        with alice.stream_generate(SECRET, max_tokens=3) as stream:
            list(stream)
        alice.score([(SECRET, SECRET)])
        alice.tokenize(SECRET)
        alice.chat(SECRET, max_tokens=3)
        for wrong in ({"temperature": -1.0}, {"stop": [""]}, {"cache_salt": SECRET * 1000}):
            with pytest.raises(InvalidArgument):
                alice.generate(SECRET, **wrong)
        for refused in (
            lambda: alice.generate(SECRET * 10_000),
            lambda: alice.generate(SECRET, model=SECRET),
            lambda: alice.get_model(SECRET),
            lambda: alice.health(SECRET),
        ):
            with pytest.raises(SalverError):
                refused()
    with client(guarded, authority, SECRET) as stranger, pytest.raises(Unauthenticated):
        stranger.generate(SECRET)
    token_file(tokens, (ALICE, "alice"), (EVE, "eve"), (SECRET, "late"), more=f"{SECRET} = 1\n")

    def not_reloaded() -> bool:
        with client(guarded, authority, EVE) as eve:
            eve.server_info()
        return "not reloaded" in guarded.log

    wait_until("the bad file in the log", not_reloaded)
    assert "refused" in guarded.log
    for secret in (SECRET, ALICE, EVE, *re.findall(r'"([0-9a-f]{64})"', tokens.read_text())):
        assert secret not in guarded.log
