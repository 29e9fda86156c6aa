"""Salver beside its peers on one machine: `make bench-peers`. See docs/benchmarks.md.

Every run is written to a JSON file as soon as it is made, and a later call goes on from there. The table
goes to standard output, progress to standard error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import machine
from benchmarks.checkpoint import checkpoint_of, default_cache_dir, source_of
from benchmarks.figures import BenchError, Run, summarize
from benchmarks.measure import about
from benchmarks.peer_table import report
from benchmarks.peers import PEERS, Peer, Setting, make_peers
from benchmarks.processes import Server, memory_of
from benchmarks.records import Record, Records
from benchmarks.workload import (
    POINTS,
    TRACE_SAMPLE,
    Arrival,
    BenchRequest,
    Kind,
    Point,
    make_requests,
    read_trace,
    scale_trace,
    trace_requests,
)

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = -1  # the repeat number of runs that are not kept
WARM_UP_OF_TRACE = "batch_16"
TRACE_REQUESTS = 40
TRACE_RATE = 1.5
"""Requests a second: about as many as the fastest system here can answer, so that all are busy."""
TRACE_SHRINK = 4.0
IDLE_SHARE = 0.05
"""Of one core, that all waiting systems together may use while another is measured."""


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message on a bad one."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as for `salver serve` (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, of: %(default)s")
    parser.add_argument("--points", default=",".join([*POINTS, "trace"]), help="likewise, of: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of each system")
    parser.add_argument(
        "--trace",
        type=Path,
        default=Path(os.environ.get("SALVER_BENCH_TRACE", TRACE_SAMPLE)),
        help="a file in the Azure LLM inference traces' format (default: SALVER_BENCH_TRACE, or a sample)",
    )
    parser.add_argument("--trace-requests", type=int, default=TRACE_REQUESTS, help="(default: %(default)s)")
    parser.add_argument(
        "--trace-rate", type=float, default=TRACE_RATE, help="per second (default: %(default)s)"
    )
    parser.add_argument(
        "--trace-shrink", type=float, default=TRACE_SHRINK, help="divides its lengths (default: %(default)s)"
    )
    parser.add_argument(
        "--serve-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more for `salver serve`, repeatable",
    )
    parser.add_argument("--install-only", action="store_true", help="install the peers, measure nothing")
    parser.add_argument(
        "--report-only", action="store_true", help="print the table of --out, measure nothing"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".peers", help="of the peers' environments")
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="of converted checkpoints"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON of all runs, gone on with (default: bench-results/peers-COMMIT.json)"
    )
    args = parser.parse_args(argv)
    for option, known in (("peers", list(PEERS)), ("points", [*POINTS, "trace"])):
        names = [name.strip() for name in getattr(args, option).split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        if not names:
            parser.error(f"--{option}: none given")
        setattr(args, option, names)
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    if args.trace_requests < 2 or args.trace_rate <= 0 or args.trace_shrink <= 0:
        parser.error("--trace-requests is at least 2; --trace-rate and --trace-shrink are positive")
    return args


def measure_roofline(threads: int) -> dict[str, float]:
    """Of this moment. Raises BenchError."""
    script = Path(__file__).with_name("roofline.py")
    try:
        ended = subprocess.run(
            [sys.executable, script, "--threads", str(threads)], capture_output=True, text=True, check=True
        )
    except subprocess.CalledProcessError as error:
        raise BenchError(f"the roofline: {error.stderr[-500:]}") from error
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def setting_of(args: argparse.Namespace) -> Setting:
    """Starts Salver once, which fetches and converts the model, and asks it about it. Raises BenchError."""
    server = Server(
        args.model,
        dtype="bfloat16",
        threads=args.threads,
        extra=[*args.serve_arg, "--cache-dir", str(args.cache_dir)],
    )
    with server:
        server.start()
        said = about(server)
    return Setting(
        folder=args.folder.resolve(),
        checkpoint=checkpoint_of(args.model, "bfloat16", args.cache_dir),
        model=args.model,
        source=source_of(args.model, args.cache_dir),
        cache_dir=args.cache_dir,
        threads=args.threads,
        vocab_size=said.vocab_size,
        max_model_len=said.max_model_len,
        serve_args=tuple(args.serve_arg),
    )


class Comparison:
    """The runs of one call. Only one system works at any time; the others wait, and are seen to."""

    def __init__(self, args: argparse.Namespace, setting: Setting, records: Records) -> None:
        self.args = args
        self.setting = setting
        self.records = records
        self.points: list[Point] = []
        self.trace: list[Arrival] = []
        for name in args.points:
            if name == "trace":
                self.trace = scale_trace(
                    read_trace(args.trace),
                    num_requests=args.trace_requests,
                    rate=args.trace_rate,
                    shrink=args.trace_shrink,
                    max_length=setting.max_model_len,
                )
                self.points.append(self._trace_point())
            else:
                self.points.append(POINTS[name])

    def _trace_point(self) -> Point:
        prompts = [arrival.prompt_length for arrival in self.trace]
        outputs = [arrival.output_length for arrival in self.trace]
        title = (
            f"trace: {len(self.trace)} at {self.args.trace_rate:g}/s, "
            f"{min(prompts)}-{max(prompts)} in, {min(outputs)}-{max(outputs)} out"
        )
        lengths = (min(prompts), max(prompts)), (min(outputs), max(outputs))
        return Point("trace", title, Kind.TRACE, len(self.trace), *lengths)

    def _requests(self, point: Point, repeat: int) -> tuple[BenchRequest, ...]:
        seed, vocab_size = self.args.seed, self.setting.vocab_size
        if point.kind is Kind.TRACE:
            if repeat != WARM_UP:
                return trace_requests(self.trace, seed=seed, repeat=repeat, vocab_size=vocab_size)
            point = POINTS[WARM_UP_OF_TRACE]
        return make_requests(point, seed=seed, repeat=repeat, vocab_size=vocab_size)

    def _missing(self, peer: Peer) -> list[Point]:
        """Points of which it has too few runs."""
        return [
            point
            for point in self.points
            if any(not self.records.has(peer.name, point.name, n) for n in range(self.args.repeats))
        ]

    def run(self) -> None:
        """Installs, starts, warms up and measures; what fails is recorded and the rest goes on."""
        peers = make_peers(self.args.peers, self.setting)
        self.records.note_points(self.points, peers)
        up: list[Peer] = []
        ready: list[Peer] = []
        try:
            # All are installed before any is started: a build would starve a server that runs.
            ready = [peer for peer in peers if self._missing(peer) and self._installed(peer)]
            if self.args.install_only or not ready:
                return
            self.records.add_roofline(measure_roofline(self.args.threads))
            # Each is started in memory that no other one fills yet with the same pages, and warmed up.
            up.extend(peer for peer in ready if self._started(peer))
            for repeat in range(self.args.repeats):
                for point in self.points:
                    first = repeat % len(up) if up else 0  # the order turns: a drift favours nobody
                    for peer in [*up[first:], *up[:first]]:
                        if not self.records.has(peer.name, point.name, repeat):
                            self._measure(peer, point, repeat, up)
            self.records.add_roofline(measure_roofline(self.args.threads))
        finally:
            for peer in ready:
                peer.stop()

    def _installed(self, peer: Peer) -> bool:
        progress(f"installing {peer.name} (once)")
        try:
            peer.install()
        except BenchError as error:
            self._failed(peer, "*", f"install: {error}")
            return False
        return True

    def _started(self, peer: Peer) -> bool:
        progress(f"starting {peer.name}")
        try:
            peer.start()
            progress(f"{peer.name} started in {peer.start_seconds:.1f} s; warm-up")
            idle = memory_of(peer.pid)
            for point in self._missing(peer):
                requests = self._requests(point, WARM_UP)
                traces, wall = peer.run(requests)
                warm = POINTS[WARM_UP_OF_TRACE] if point.kind is Kind.TRACE else point
                summarize(warm, requests, traces, wall)
            self.records.note_peer(peer, idle, memory_of(peer.pid))
        except BenchError as error:
            peer.stop()
            self._failed(peer, "*", f"start: {error}")
            return False
        return True

    def _failed(self, peer: Peer, point: str, reason: str) -> None:
        progress(f"{peer.name} {point} failed: {reason}")
        self.records.fail(peer.name, point, reason)

    def _wait_until_idle(self, others: Sequence[Peer], timeout: float = 15.0) -> None:
        """Returns once the other systems together use next to no CPU. Raises BenchError naming who does."""
        end = time.monotonic() + timeout
        while True:
            before = {peer.name: cpu_seconds(peer.pid) for peer in others}
            time.sleep(0.3)
            used = {peer.name: (cpu_seconds(peer.pid) - before[peer.name]) / 0.3 for peer in others}
            if sum(used.values()) <= IDLE_SHARE:
                return
            if time.monotonic() > end:
                busy = max(used, key=lambda name: used[name])
                raise BenchError(f"{busy} uses {used[busy]:.0%} of a core while it should wait")

    def _measure(self, peer: Peer, point: Point, repeat: int, up: Sequence[Peer]) -> None:
        requests = self._requests(point, repeat)
        try:
            self._wait_until_idle([other for other in up if other is not peer])
            traces, wall = peer.run(requests)
            run = summarize(point, requests, traces, wall)
        except BenchError as error:
            self._failed(peer, point.name, f"repeat {repeat + 1}: {error}")
            return
        self.records.add(record_of(peer, point, repeat, run))
        progress(
            f"{repeat + 1}/{self.args.repeats} {point.name} {peer.name}: "
            f"{run.tokens_per_second:.1f} tok/s in {run.wall:.2f} s"
        )


def cpu_seconds(pid: int) -> float:
    """Of a process and all its descendants, so far; 0 when it is gone."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
        times = [process.cpu_times() for process in tree]
    except psutil.NoSuchProcess:
        return 0.0
    return float(sum(spent.user + spent.system for spent in times))


def record_of(peer: Peer, point: Point, repeat: int, run: Run) -> Record:
    """What is kept of a run."""
    return Record(
        peer=peer.name,
        point=point.name,
        repeat=repeat,
        tokens_per_second=run.tokens_per_second,
        wall=run.wall,
        latencies=run.latencies,
        notes=run.notes,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every point of every asked peer was measured, 1 when any was not."""
    args = parse(sys.argv[1:] if argv is None else argv)
    header: dict[str, Any] = machine.header(ROOT)
    out: Path = args.out or ROOT / "bench-results" / f"peers-{header['commit']}.json"
    workload = {
        name: getattr(args, name)
        for name in ("model", "seed", "threads", "serve_arg", "trace_requests", "trace_rate", "trace_shrink")
    }
    workload["trace"] = args.trace.name
    try:
        records = Records.open(out, header, workload)
        if not args.report_only:
            if header["load_average"] > 0.5:
                progress(f"the machine is busy (load {header['load_average']}): the figures will suffer")
            Comparison(args, setting_of(args), records).run()
        if args.install_only:
            return 1 if any(records.failures.get(f"{peer}/*") for peer in args.peers) else 0
    except (BenchError, OSError, ValueError) as error:
        progress(str(error))
        return 1
    print(report(records, PEERS))
    progress(f"written to {out}")
    return 1 if records.failed(args.peers, args.points) else 0


if __name__ == "__main__":
    raise SystemExit(main())
