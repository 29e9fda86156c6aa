"""The processes that are measured: the server and the baseline. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import BenchError, Trace
from benchmarks.workload import BenchRequest

SERVING = re.compile(r"^serving (?P<name>\S+) on (?P<address>\S+:\d+)\s*$")
METRICS = re.compile(r"metrics.*?(?P<address>[\w.\[\]-]+:\d+)")
SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{.*\})? (?P<value>\S+)")
TAIL_LINES = 30
STEP_SECONDS = "salver_step_duration_seconds_sum"
MODEL_SECONDS = "salver_step_model_duration_seconds_sum"


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process tree in bytes. RSS counts a page shared by two processes twice;
    PSS shares it out, and is None where the system does not tell."""

    processes: int
    rss: int
    pss: int | None


def memory_of(pid: int) -> Memory:
    """What the process and all its descendants hold now. Raises BenchError when it is gone."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise BenchError("the process is gone") from None
    counted, rss, pss = 0, 0, 0
    knows_pss = True
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child that ended meanwhile holds nothing
            info = process.memory_full_info()
            counted += 1
            rss += info.rss
            knows_pss = knows_pss and hasattr(info, "pss")
            pss += getattr(info, "pss", 0)
    return Memory(counted, rss, pss if knows_pss else None)


@contextlib.contextmanager
def peak_memory(pid: int, interval: float = 0.1) -> Iterator[list[Memory]]:
    """Samples the process tree while the body runs; afterwards the list holds the largest by RSS.

    Reading PSS walks page tables, so nothing that is timed should run in the body.
    """
    peak: list[Memory] = [memory_of(pid)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            try:
                now = memory_of(pid)
            except BenchError:
                return  # the server died: the request in the body reports it
            if now.rss > peak[0].rss:
                peak[0] = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


class Server:
    """`salver serve`, started and stopped here. Use as a context manager.

    `start_seconds` is the wall time from spawning the command to its `serving` line.
    """

    def __init__(self, model: str, *, dtype: str, threads: int, extra: Sequence[str] = ()) -> None:
        command = Path(sys.executable).with_name("salver")
        if not command.exists():
            raise BenchError(f"no {command}: install salver[server] into this environment")
        self.command = [str(command), "serve", model, "--host", "127.0.0.1", "--port", "0"]
        self.command += ["--metrics-port", "0", "--dtype", dtype, "--threads", str(threads), *extra]
        self.address = ""
        self.name = ""
        self.metrics_address: str | None = None
        self.start_seconds = 0.0
        self.lines: deque[str] = deque(maxlen=500)
        self._settled = threading.Event()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 900.0) -> None:
        """Returns once it serves. The limit leaves room for a first start's download and conversion.

        Raises BenchError with the end of its output when it ends or takes too long.
        """
        started = time.perf_counter()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, args=(started,), daemon=True)
        self._reader.start()
        self._settled.wait(timeout)
        if not self.address:
            self.stop()
            raise BenchError(f"the server did not start: {self.tail()}")

    def _read(self, started: float) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if serving := SERVING.match(line):
                self.start_seconds = time.perf_counter() - started
                self.name, self.address = serving["name"], serving["address"]
                self._settled.set()
            elif not self.metrics_address and (metrics := METRICS.search(line)):
                self.metrics_address = metrics["address"]
        self._settled.set()  # end of its output: it ended

    def tail(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(list(self.lines)[-TAIL_LINES:]) or "(no output)"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels. Empty when it told no metrics address.

        Raises BenchError when the page cannot be read.
        """
        if self.metrics_address is None:
            return {}
        try:
            with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as page:
                text = page.read().decode()
        except OSError as error:
            raise BenchError(f"/metrics on {self.metrics_address}: {error}") from error
        return parse_metrics(text)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for the whole tree if that takes more than 30 s."""
        if not self.alive:
            return
        children = psutil.Process(self.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()
        self._reader.join(5)


def parse_metrics(text: str) -> dict[str, float]:
    """The samples of a Prometheus text exposition by name, summed over their labels."""
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if sample := SAMPLE.match(line):
            name = sample["name"]
            samples[name] = samples.get(name, 0.0) + float(sample["value"])
    return samples


def outside_model_share(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Of the steps between two readings of the metrics, the share of time outside the model's forward pass.

    None where the server does not export both sums, or no step ran.
    """
    if MODEL_SECONDS not in after or STEP_SECONDS not in after:
        return None
    total = after[STEP_SECONDS] - before.get(STEP_SECONDS, 0.0)
    return 1 - (after[MODEL_SECONDS] - before.get(MODEL_SECONDS, 0.0)) / total if total > 0 else None


class InProcess:
    """A system that is called in process, in a process of ours that speaks as `baseline.py` does: idle
    (blocked on its input) while another one is measured. Raises BenchError when it does not come up."""

    def __init__(self, command: Sequence[str], *, what: str, timeout: float = 900.0) -> None:
        self._timeout = timeout
        self._what = what
        self.peak_rss = 0
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = self._answer()
        self.start_seconds = time.perf_counter() - started

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        limit = threading.Timer(self._timeout, self._process.kill)
        limit.start()
        try:
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            raise BenchError(
                f"{self._what} ended (status {self._process.wait()}) or took {self._timeout:g} s"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        """The traces of the requests and the wall time in seconds. Raises BenchError."""
        question = {
            "prompts": [list(request.prompt) for request in requests],
            "max_tokens": [request.max_tokens for request in requests],
            "at": [request.at for request in requests],
        }
        answer = self.ask(question)
        self.peak_rss = max(self.peak_rss, answer["peak_rss"])
        if "error" in answer:
            raise BenchError(answer["error"])
        traces = [
            Trace([(moment, count) for moment, count in trace["arrivals"]], trace["token_ids"])
            for trace in answer["traces"]
        ]
        return traces, answer["wall"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line in, one out. Raises BenchError."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except OSError as error:
            raise BenchError(f"{self._what} is gone: {error}") from error
        return self._answer()


class Baseline(InProcess):
    """`benchmarks/baseline.py` (`transformers.generate` on static batches), or a script called as it is."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        dtype: str,
        threads: int,
        script: str = "baseline.py",
        extra: Sequence[str] = (),
    ) -> None:
        path = Path(__file__).with_name(script)
        command = [sys.executable, str(path), str(checkpoint), "--dtype", dtype, "--threads", str(threads)]
        super().__init__([*command, *extra], what="the baseline")
