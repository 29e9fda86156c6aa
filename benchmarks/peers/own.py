"""Salver itself, through gRPC with `--numerics exact`, its default."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from benchmarks import measure
from benchmarks.figures import BenchError, Trace
from benchmarks.peers.peer import OWN, About, Peer
from benchmarks.processes import Server
from benchmarks.workload import BenchRequest
from salver.client import SalverError


class SalverPeer(Peer):
    """`salver serve`, from the environment that the benchmark runs in."""

    title = "Salver"
    way = "gRPC"
    is_salver = True
    options: ClassVar[tuple[str, ...]]
    _server: Server | None = None

    def install(self) -> None:
        """The benchmark's own environment has it."""

    def start(self) -> None:
        setting = self.setting
        extra = [*self.options, *setting.serve_args, "--cache-dir", str(setting.cache_dir)]
        self._server = Server(setting.model, dtype="bfloat16", threads=setting.threads, extra=extra)
        self._server.start()
        self.start_seconds = self._server.start_seconds
        said = measure.about(self._server)
        self.about = About(
            {"salver": said.version, "torch": said.torch_version},
            f"--dtype bfloat16 --threads {setting.threads} {' '.join(extra[:-2])}".strip()
            + f"; numerics_id {said.numerics_id}",
        )

    def run(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        server = self._server
        if server is None or not server.alive:
            raise BenchError(f"the server died: {server.tail() if server else 'it never started'}")
        try:
            return asyncio.run(measure.stream_all(server.address, requests))
        except SalverError as error:
            raise BenchError(f"{type(error).__name__}: {error}") from error

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def pid(self) -> int:
        assert self._server is not None
        return self._server.pid


class SalverBfloat16(SalverPeer):
    name = f"{OWN}bf16"
    precision = "bf16"
    options = ()


class SalverInt8(SalverPeer):
    name = f"{OWN}int8"
    precision = "int8"
    options = ("--quantization", "int8")


class SalverInt4(SalverPeer):
    name = f"{OWN}int4"
    precision = "int4"
    options = ("--quantization", "int4")
