"""A real `salver serve` process, and what a test asks of it from outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from support import calls

from salver.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc, tokenization_pb2_grpc

SALVER = str(Path(sys.executable).with_name("salver"))
START_TIMEOUT = 120.0
T = TypeVar("T")


def wait_until(what: str, condition: Callable[[], T], timeout: float = 30.0, pause: float = 0.02) -> T:
    """Poll `condition` until it is truthy; its value. AssertionError naming `what` after `timeout` s."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(pause)


class Server:
    """One `salver serve`, its stubs, its metrics, its processes. Ends with `stop()`."""

    def __init__(
        self,
        model: str,
        *flags: str,
        env: dict[str, str] | None = None,
        command: Sequence[str] = (SALVER, "serve"),
        open_files: int | None = None,
    ) -> None:
        """`open_files` is the most that each of its processes may have."""
        command = [*command, model, "--port", "0", "--metrics-port", "0", *flags]
        if setpriv := shutil.which("setpriv"):  # nothing outlives tests that are killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        if open_files is not None:
            command = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh", *command]
        # Passive: the tests, the front and other servers share the cores with the worker's threads, and
        # OpenMP's spinning barriers then cost ten times the work.
        environment = {
            **os.environ,
            "SALVER_CHECK_INTEGRITY": "1",
            "OMP_WAIT_POLICY": "passive",
            **(env or {}),
        }
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.address = self.wait_for_line(r"^listening on (\S+)$")
        except BaseException:
            self.kill()
            raise
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.tokenization: Any = tokenization_pb2_grpc.TokenizationServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    # ---- the process ----

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str) -> str:
        def found() -> str | None:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match.group(1)
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            return None

        return wait_until(f"a line {pattern!r}", found, START_TIMEOUT) or ""

    def wait_serving(self) -> Server:
        self.name = self.wait_for_line(r"^serving (\S+) on ")
        return self

    @property
    def metrics_url(self) -> str:
        return self.wait_for_line(r"metrics.* (http://\S+)")

    @property
    def worker(self) -> psutil.Process:
        """The worker process that is alive now; AssertionError when there is none within 30 s."""

        def find() -> psutil.Process | None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if "--page-fd" in child.cmdline() and child.status() != "zombie":
                        return child
                except psutil.NoSuchProcess:
                    continue
            return None

        found = wait_until("a worker process", find)
        assert found is not None
        return found

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Signal the front, wait for all of it to be gone, return its exit status."""
        self.channel.close()
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signum)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"still alive {timeout} s after {signum}:\n{self.log}") from None
            _, alive = psutil.wait_procs(children, timeout=10)
            for child in alive:
                child.kill()
            assert not alive, f"left behind: {alive}"
        self._reader.join(10)
        return self.process.returncode

    def kill(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)

    # ---- calls ----

    def generate(self, prompt: calls.Prompt, **fields: Any) -> Any:
        return self.generation.Generate(calls.generate_request(prompt, **fields), timeout=calls.TIMEOUT)

    def tokens(self, prompt: calls.Prompt, **fields: Any) -> list[int]:
        """The tokens of the only sample."""
        (tokens,) = calls.tokens_of(self.generate(prompt, **fields))
        return tokens

    def together(self, requests: Sequence[Any]) -> list[Any]:
        """Send all of them at once; the replies in the order of the requests."""
        futures = [self.generation.Generate.future(r, timeout=calls.TIMEOUT) for r in requests]
        return [future.result() for future in futures]

    def stream(self, prompt: calls.Prompt, **fields: Any) -> Any:
        return self.generation.StreamGenerate(calls.stream_request(prompt, **fields), timeout=calls.TIMEOUT)

    def server_info(self) -> Any:
        return self.models.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=10)

    def health_of(self, service: str = "") -> int:
        status: int = self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        return status

    def wait_health(self, status: int, timeout: float, service: str = "") -> float:
        """Seconds until Check says `status`."""
        start = time.monotonic()
        wait_until(f"health {status}", lambda: self.health_of(service) == status, timeout)
        return time.monotonic() - start

    # ---- metrics ----

    def exposition(self) -> str:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as reply:
            text: str = reply.read().decode()
        return text

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample of the exposition by its name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.exposition())
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of `name` that carry `labels`; AssertionError when there is none."""
        return total(self.metrics(), name, **labels)

    def occupancy(self) -> tuple[float, float, float]:
        """Requests running and waiting, share of cache blocks in use."""
        now = self.metrics()
        return (
            total(now, "salver_num_requests_running"),
            total(now, "salver_num_requests_waiting"),
            total(now, "salver_kv_cache_usage_ratio"),
        )

    def wait_idle(self, timeout: float = 10.0) -> None:
        """Nothing runs, nothing waits, and no block of the cache is owned."""
        wait_until("an empty server", lambda: self.occupancy() == (0, 0, 0), timeout)


def total(metrics: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    found = [v for (n, of), v in metrics.items() if n == name and labels.items() <= dict(of).items()]
    assert found, f"no series {name} with {labels}"
    return sum(found)
