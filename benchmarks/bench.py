"""Salver beside `transformers.generate`, on one machine, in one run. See docs/benchmarks.md.

Starts `salver serve MODEL` itself, measures it through gRPC, and prints a markdown table to standard
output; progress goes to standard error, everything that was measured to a JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import machine, table
from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.figures import BenchError, PointResult, Run, Side, summarize
from benchmarks.measure import About, about, run_point
from benchmarks.processes import Baseline, Memory, Server, memory_of, peak_memory
from benchmarks.workload import POINTS, BenchRequest, Point, make_requests

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BAR = 1_200_000_000
"""Bytes resident in all of the server's processes, for the default model with its default cache."""
WARM_UP = -1  # the repeat number of runs that are not kept


@dataclasses.dataclass(slots=True)
class Startup:
    """The second start: nothing is downloaded or converted in it."""

    first_seconds: float
    seconds: float
    phases: tuple[tuple[str, float], ...]


@dataclasses.dataclass(slots=True)
class MemoryUse:
    """Of all server processes, right after the start and at its largest under the heaviest point."""

    idle: Memory
    peak: Memory
    load: str
    baseline_peak_rss: int = 0

    @property
    def resident(self) -> int:
        """The larger RSS sum, bytes."""
        return max(self.idle.rss, self.peak.rss)


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message on a bad one."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as for `salver serve` (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--points",
        default=",".join(POINTS),
        help="comma-separated, of: %(default)s (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=machine.cores(), help="of the server and of the baseline, each"
    )
    parser.add_argument("--skip-baseline", action="store_true", help="measure Salver alone")
    parser.add_argument(
        "--serve-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more argument for `salver serve`, repeatable: --serve-arg=--numerics=fast",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="of converted checkpoints (default: SALVER_CACHE_DIR, or the server's own)",
    )
    parser.add_argument("--out", type=Path, help="the JSON file (default: bench-results/DATE-DTYPE.json)")
    args = parser.parse_args(argv)
    args.points = [name.strip() for name in args.points.split(",") if name.strip()]
    if unknown := [name for name in args.points if name not in POINTS]:
        parser.error(f"--points: unknown {', '.join(unknown)}; known: {', '.join(POINTS)}")
    if not args.points:
        parser.error("--points: none given")
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    return args


class Bench:
    """One run of the benchmark. Only one of server and baseline works at any time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = {name: PointResult(POINTS[name]) for name in args.points}
        self.startup: Startup | None = None
        self.memory: MemoryUse | None = None
        self.about: About | None = None
        self.baseline_about: dict[str, Any] = {}
        self.problems: list[str] = []  # beside the failures that belong to a point

    def _server(self) -> Server:
        args = self.args
        extra = [*args.serve_arg, "--cache-dir", str(args.cache_dir)]
        server = Server(args.model, dtype=args.dtype, threads=args.threads, extra=extra)
        progress(f"starting {' '.join(server.command[1:])}")
        server.start()
        return server

    def _requests(self, point: Point, repeat: int) -> tuple[BenchRequest, ...]:
        assert self.about is not None
        return make_requests(point, seed=self.args.seed, repeat=repeat, vocab_size=self.about.vocab_size)

    def run(self) -> None:
        """Everything, in order. Raises BenchError when the server cannot be started at all."""
        with self._server() as first:
            first_seconds = first.start_seconds
        with self._server() as server:
            self.about = about(server)
            self.startup = Startup(first_seconds, server.start_seconds, self.about.phases)
            self._warm_up_and_memory(server)
            if self.args.skip_baseline:
                self._measure(server, None)
                return
            progress("loading the baseline")
            try:
                checkpoint = checkpoint_of(self.args.model, self.args.dtype, self.args.cache_dir)
                baseline = Baseline(checkpoint, dtype=self.args.dtype, threads=self.args.threads)
            except BenchError as error:
                self.problems.append(f"no baseline: {error}")
                self._measure(server, None)
                return
            with baseline:
                self.baseline_about = baseline.about
                self._measure(server, baseline)
                if self.memory is not None:
                    self.memory.baseline_peak_rss = baseline.peak_rss

    def _warm_up_and_memory(self, server: Server) -> None:
        """Runs every point once unkept; samples memory over it, while no baseline shares its pages."""
        progress("warm-up of the server, and its memory")
        try:
            idle = memory_of(server.pid)
            with peak_memory(server.pid) as peak:
                for result in self.results.values():
                    run_point(server, result.point, self._requests(result.point, WARM_UP))
            self.memory = MemoryUse(idle, peak[0], ", ".join(self.results))
        except BenchError as error:
            self.problems.append(f"warm-up and memory: {error}")

    def _measure(self, server: Server, baseline: Baseline | None) -> None:
        if baseline is not None:
            for result in self.results.values():
                progress(f"warm-up of the baseline: {result.point.name}")
                try:
                    baseline.run(self._requests(result.point, WARM_UP))
                except BenchError as error:
                    self.problems.append(f"warm-up of the baseline, {result.point.name}: {error}")
        for repeat in range(self.args.repeats):
            for result in self.results.values():
                self._measure_point(result, repeat, server, baseline)

    def _measure_point(
        self, result: PointResult, repeat: int, server: Server, baseline: Baseline | None
    ) -> None:
        point, requests = result.point, self._requests(result.point, repeat)

        def ours() -> Run:
            if not server.alive:
                raise BenchError(f"the server died: {server.tail()}")
            return run_point(server, point, requests)

        def theirs() -> Run:
            assert baseline is not None
            traces, wall = baseline.run(requests)
            return summarize(point, requests, traces, wall)

        sides: list[tuple[str, Side, Callable[[], Run]]] = [("salver", result.salver, ours)]
        if baseline is not None:
            sides.append(("transformers", result.baseline, theirs))
        if repeat % 2:  # who goes first alternates: a slow drift of the machine favours nobody
            sides.reverse()
        for name, side, measure in sides:
            try:
                run = measure()
            except BenchError as error:
                side.errors.append(f"repeat {repeat + 1}: {error}")
                progress(f"{repeat + 1}/{self.args.repeats} {point.name} {name}: failed: {error}")
            else:
                side.runs.append(run)
                progress(
                    f"{repeat + 1}/{self.args.repeats} {point.name} {name}: "
                    f"{run.tokens_per_second:.1f} tok/s in {run.wall:.2f} s"
                )

    @property
    def failed(self) -> bool:
        return bool(self.problems) or any(result.failed for result in self.results.values())


def report(bench: Bench, header: dict[str, Any]) -> str:
    """The markdown report: the machine, the points, memory, start-up, and what went wrong."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    args = bench.args
    lines = [
        f"{header['cpu']}, {header['cores']} cores, load {header['load_average']} before; {versions}; "
        f"commit {header['commit']}; {header['date']}",
        "",
        f"{args.model}, {args.dtype}, {args.threads} threads each, median of {args.repeats}, seed {args.seed}"
        + (f", {' '.join(args.serve_arg)}" if args.serve_arg else "")
        + (f"; numerics_id {bench.about.numerics_id}" if bench.about else ""),
        "",
        table.points_table(list(bench.results.values())),
        "",
    ]
    if bench.memory is not None:
        lines += [_memory_line(bench.memory), ""]
    if bench.startup is not None:
        lines += [
            table.phases_table(bench.startup.phases, bench.startup.seconds),
            "",
            f"The start before it: {bench.startup.first_seconds:.3f} s (downloads and converts if need be).",
        ]
    lines += [f"- {problem}" for problem in bench.problems]
    return "\n".join(lines)


def _memory_line(memory: MemoryUse) -> str:
    verdict = "within" if memory.resident <= MEMORY_BAR else "ABOVE"
    line = (
        f"Memory of the {memory.idle.processes} server processes: RSS sum {table.megabytes(memory.idle.rss)} "
        f"after the start, {table.megabytes(memory.peak.rss)} at most under {memory.load} "
        f"({verdict} {table.megabytes(MEMORY_BAR)}); PSS sum {table.megabytes(memory.idle.pss)} and "
        f"{table.megabytes(memory.peak.pss)}."
    )
    if memory.baseline_peak_rss:
        line += f" The baseline's peak RSS: {table.megabytes(memory.baseline_peak_rss)}."
    return line


def as_json(bench: Bench, header: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, every run."""

    def side(side: Side) -> dict[str, Any]:
        runs = [dataclasses.asdict(run) for run in side.runs]
        for run in runs:
            del run["token_ids"]  # long, and made anew from the seed
        return {
            "tokens_per_second": side.tokens_per_second,
            "outside_model_share": side.outside_model_share,
            "spread": _spread(side),
            "errors": side.errors,
            "runs": runs,
        }

    return {
        "format": 1,
        "machine": header,
        "options": {
            name: value for name, value in vars(bench.args).items() if name not in ("out", "cache_dir")
        },
        "server": None if bench.about is None else dataclasses.asdict(bench.about),
        "baseline": bench.baseline_about,
        "startup": None if bench.startup is None else dataclasses.asdict(bench.startup),
        "memory": None if bench.memory is None else dataclasses.asdict(bench.memory),
        "points": [
            {
                "name": result.point.name,
                "title": result.point.title,
                "ratio": result.ratio,
                "same_outputs": result.same_outputs,
                "salver": side(result.salver),
                "transformers": side(result.baseline),
            }
            for result in bench.results.values()
        ],
        "problems": bench.problems,
    }


def _spread(side: Side) -> float | None:
    """(largest - smallest) / median of the runs' tokens/s: how steady the machine was."""
    values = [run.tokens_per_second for run in side.runs]
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every point was measured, 1 when any failed."""
    args = parse(sys.argv[1:] if argv is None else argv)
    header: dict[str, Any] = machine.header(ROOT)
    if header["load_average"] > 0.5:
        progress(f"the machine is busy (load {header['load_average']}): the figures will suffer")
    bench = Bench(args)
    try:
        bench.run()
    except BenchError as error:
        bench.problems.append(str(error))
    stamp = header["date"].replace(":", "").replace("+0000", "Z")
    out: Path = args.out or ROOT / "bench-results" / f"{stamp}-{args.dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(as_json(bench, header), indent=1) + "\n")
    print(report(bench, header))
    progress(f"written to {out}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
