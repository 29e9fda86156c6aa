"""`salver deploy-check`: a running deployment, looked at from where its clients are."""

from __future__ import annotations

import argparse
import datetime
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from salver.client.addresses import to_target
from salver.client.cli.connection import connect, connection_options
from salver.client.cli.output import as_json, table
from salver.client.client import Client
from salver.client.errors import SalverError, Unauthenticated
from salver.client.options import ConnectionOptions
from salver.client.types import Model, ServerInfo

OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "skipped"
# Beside the drain, a pod's grace has preStop (5 s) and the end of the process (5 s): deploy/kubernetes.
BESIDE_DRAIN = 10.0
_EXPIRES_SOON = datetime.timedelta(days=14)
_REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
_LIST_SERVICES = b"\x3a\x00"  # ServerReflectionRequest { list_services: "" }


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `status` is ok, warn, FAIL or skipped."""

    check: str
    status: str
    detail: str


def deploy_check(options: argparse.Namespace) -> int:
    """Prints every finding; 1 when one of them is a failure."""
    options.address = options.where or options.address
    findings: list[Finding] = []

    def found(check: str, look: Callable[[], tuple[str, str]]) -> None:
        try:
            findings.append(Finding(check, *look()))
        except (SalverError, OSError, grpc.RpcError) as error:
            findings.append(Finding(check, FAIL, str(error) or type(error).__name__))

    with connect(options) as client:
        for name in ("readiness", "liveness"):
            found(f"health: {name}", lambda name=name: _health(client, name))  # type: ignore[misc]
        found("answer", lambda: _answer(client))
        try:
            info: ServerInfo | None = client.server_info(timeout=10)
        except SalverError as error:
            info = None
            findings.append(Finding("server", FAIL, str(error)))
        if info is not None:
            findings += [_server(info), _messages(info), _grace(info, options.grace)]
        found("reflection", lambda: _reflection(options))
        found("tls", lambda: _tls(options))
        found("tokens", lambda: _tokens(options))
        found("metrics", lambda: _metrics(options.metrics))
        if options.watch:
            end = time.monotonic() + options.watch
            found("rolling restart", lambda: watch(client, lambda: time.monotonic() < end, options.streams))
    if options.json:
        as_json(findings)
    else:
        table(("check", "", ""), [(f.check, f.status, f.detail) for f in findings])
    return int(any(finding.status == FAIL for finding in findings))


def _health(client: Client, name: str) -> tuple[str, str]:
    status = client.health(name, timeout=10)
    return (OK if status == "SERVING" else FAIL), status


def _generates(model: Model) -> bool:
    """Whether text can be asked for; all other checkpoints embed."""
    return "generate" in model.tasks


def _answer(client: Client) -> tuple[str, str]:
    model = client.get_model(timeout=10)
    start = time.monotonic()
    if _generates(model):
        what = "token"
        client.generate("Hello", max_tokens=1, temperature=0, timeout=60)
    else:
        what = "embedding"
        client.embed("Hello", timeout=60)
    return OK, f"one {what} of {model.name} in {time.monotonic() - start:.3f} s"


def _server(info: ServerInfo) -> Finding:
    restarts = info.worker_restarts
    detail = f"{info.version} on {info.device}"
    if restarts:
        return Finding("server", WARN, f"{detail}; its worker was started anew {restarts} times")
    return Finding("server", OK, detail)


def _messages(info: ServerInfo) -> Finding:
    theirs, ours = info.limits.max_message_bytes, ConnectionOptions().max_message_bytes
    detail = f"server {theirs} bytes, clients {ours} unless told otherwise"
    return Finding("message limits", OK if theirs == ours else WARN, detail)


def _grace(info: ServerInfo, grace: float | None) -> Finding:
    needed = info.drain_period + BESIDE_DRAIN
    detail = f"the drain is {info.drain_period:g} s: terminationGracePeriodSeconds of at least {needed:g}"
    if grace is None:
        return Finding("drain", SKIPPED, f"{detail} (give yours by --grace)")
    return Finding("drain", OK if grace >= needed else FAIL, f"{detail}; it is {grace:g}")


def _channel(options: argparse.Namespace) -> grpc.Channel:
    made, target = connection_options(options), to_target(options.address)
    credentials = made.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(target.uri, made.arguments(target.several))
    return grpc.secure_channel(target.uri, credentials, made.arguments(target.several))


def _reflection(options: argparse.Namespace) -> tuple[str, str]:
    with _channel(options) as channel:
        call: Any = channel.stream_stream(_REFLECTION)
        metadata = connection_options(options).call_metadata()
        reply = next(call(iter([_LIST_SERVICES]), timeout=10, metadata=metadata))
    services = sorted({name.decode() for name in re.findall(rb"salver\.v1\.[A-Za-z]+", reply)})
    return (OK if services else FAIL), ", ".join(services) or "names no service of salver.v1"


def _tls(options: argparse.Namespace) -> tuple[str, str]:
    tls = connection_options(options).tls
    if tls is None:
        return WARN, "plaintext: fine behind a mesh that encrypts, and nowhere else"
    target = to_target(options.address).uri
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    if not port.isdecimal() or "," in target:
        return SKIPPED, "the certificate is looked at for one host:port alone"
    context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    context.set_alpn_protocols(["h2"])
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    host = host.strip("[]")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=tls.server_name or host) as wrapped,
    ):
        certificate, version = wrapped.getpeercert() or {}, wrapped.version()
    expires = datetime.datetime.fromtimestamp(
        ssl.cert_time_to_seconds(str(certificate["notAfter"])), datetime.UTC
    )
    left = expires - datetime.datetime.now(datetime.UTC)
    return (OK if left > _EXPIRES_SOON else WARN), f"{version}; the certificate expires {expires:%Y-%m-%d}"


def _tokens(options: argparse.Namespace) -> tuple[str, str]:
    made = connection_options(options)
    with Client(options.address, ConnectionOptions(tls=made.tls)) as stranger:
        try:
            stranger.server_info(timeout=10)
        except Unauthenticated:
            return OK, "a call without one is refused"
    if made.token is not None:
        return FAIL, "a token was given, and calls without one are answered too"
    return WARN, "everybody who reaches the port may call"


def _metrics(url: str | None) -> tuple[str, str]:
    if url is None:
        return SKIPPED, "give the address by --metrics http://pod:9090/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    ages = [
        float(age) for age in re.findall(r"^salver_worker_page_age_seconds\S* (\S+)$", text, re.MULTILINE)
    ]
    if "salver_build_info" not in text or not ages:
        return FAIL, "no metrics of Salver there"
    return (OK if max(ages) < 5 else FAIL), f"the worker wrote {max(ages):.2f} s ago"


@dataclass(slots=True)
class _Load:
    """Streams (or calls) that run all the time."""

    finished: int = 0
    resumed: int = 0
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def watch(client: Client, going_on: Callable[[], bool], streams: int) -> tuple[str, str]:
    """Streams one after another in each of `streams` threads; restart the deployment meanwhile.

    Of a checkpoint that generates nothing embeddings are asked instead. FAIL when one was lost: ended by an
    error, whatever the client did to resume it (or to try again).
    """
    load = _Load()
    generates = _generates(client.get_model(timeout=60))

    def ask() -> int:
        if not generates:
            client.embed("Count: 1, 2, 3,")
            return 0
        with client.stream_generate("Count: 1, 2, 3,", max_tokens=64, ignore_eos=True) as stream:
            for _ in stream:
                pass
            return stream.resumptions

    def run() -> None:
        while going_on():
            lost = ""
            resumptions = 0
            try:
                resumptions = ask()
            except SalverError as error:
                lost = f"{error.code.name}: {error}"
                time.sleep(0.1)
            with load.lock:
                load.finished += not lost
                load.resumed += bool(resumptions)
                if lost:
                    load.lost.append(lost)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    detail = f"{load.finished} embeddings"
    if generates:
        detail = f"{load.finished} streams whole, {load.resumed} of them resumed elsewhere"
    detail += f", {len(load.lost)} lost"
    return (FAIL, f"{detail}, first: {load.lost[0]}") if load.lost else (OK, detail)
