"""Overload: what a server still does when more is asked of it than it can do.

Requests arrive at random times at a given rate, whatever becomes of the earlier ones (an open loop),
each with a deadline. Goodput is the requests a second that were answered within theirs. First a ramp
finds the capacity: the goodput just before it falls, nothing being refused for its deadline. Then
multiples of that rate are offered, with and without such refusals.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import psutil

from benchmarks import machine
from benchmarks.curve import chart
from benchmarks.figures import BenchError, percentile
from benchmarks.measure import about
from benchmarks.processes import STEP_SECONDS, Server
from benchmarks.workload import FIRST_PLAIN_TOKEN, TRACE_SAMPLE, Arrival, read_trace
from salver.client import AsyncClient, ConnectionOptions, DeadlineExceeded, ResourceExhausted, SalverError

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.9
RAMP_START, RAMP_FACTOR, RAMP_MOST = 2.0, 1.4, 8
WORSE = 0.9  # of the best: the ramp is over
WITH, WITHOUT = "with refusals by deadline", "without"
STEP_TOKENS = "salver_batch_tokens_sum"
HEADER = (
    "| offered | requests/s | goodput, requests/s | of the peak | good tokens/s | refused | missed "
    "| TTFT p50, p99 s | refused within, p99 ms | waiting, most | RSS, MB | client's CPU "
    "| tokens/s in steps |\n"
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: when it is sent (seconds), what, and how long it may take."""

    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    deadline: float


@dataclass(slots=True)
class Answer:
    """What became of one. Times in seconds since the point's start; `kind` is good, refused or missed."""

    ask: Ask
    kind: str = ""
    first_token: float | None = None
    ended: float | None = None


@dataclass(slots=True)
class Measured:
    """One point of the curve, over what ended in its measured time."""

    rate: float
    goodput: float
    good_tokens_per_second: float
    refused: int
    missed: int
    ttft_p50: float | None
    ttft_p99: float | None
    refusal_p99: float | None
    most_waiting: int
    rss: int
    client_cpu: float  # of one core
    tokens_per_step_second: float  # computed, prompts included: how fast the machine was


@dataclass(slots=True)
class Watch:
    """What is seen of the server while a point runs."""

    rss: int = 0
    most_waiting: int = 0
    tokens_per_step_second: float = 0.0
    cpu: float = field(default_factory=time.process_time)


def asks(
    trace: Sequence[Arrival], args: argparse.Namespace, rate: float, seconds: float, vocabulary: int
) -> Iterator[Ask]:
    """Poisson arrivals with lengths of the trace; equal arguments give equal requests."""
    draw = random.Random(f"overload/{args.seed}/{rate:.6f}")
    at = draw.expovariate(rate)
    while at < seconds:
        lengths = draw.choice(trace)
        prompt = max(1, round(lengths.prompt_length / args.shrink))
        output = max(1, round(lengths.output_length / args.shrink))
        ids = tuple(draw.randrange(FIRST_PLAIN_TOKEN, vocabulary) for _ in range(prompt))
        yield Ask(at, ids, output, args.slack + args.slack_per_token * output)
        at += draw.expovariate(rate)


def measured(rate: float, answers: Sequence[Answer], begin: float, end: float, watch: Watch) -> Measured:
    """The figures over what ended between `begin` and `end`."""
    ended = [a for a in answers if a.ended is not None and begin <= a.ended < end]
    good = [a for a in ended if a.kind == "good"]
    firsts = [a.first_token - a.ask.at for a in ended if a.first_token is not None]
    refusals = [a.ended - a.ask.at for a in ended if a.kind == "refused" and a.ended is not None]
    seconds = end - begin
    return Measured(
        rate=rate,
        goodput=len(good) / seconds,
        good_tokens_per_second=sum(a.ask.max_tokens for a in good) / seconds,
        refused=len(refusals),
        missed=sum(a.kind == "missed" for a in ended),
        ttft_p50=percentile(firsts, 50) if firsts else None,
        ttft_p99=percentile(firsts, 99) if firsts else None,
        refusal_p99=percentile(refusals, 99) if refusals else None,
        most_waiting=watch.most_waiting,
        rss=watch.rss,
        client_cpu=(time.process_time() - watch.cpu) / end,
        tokens_per_step_second=watch.tokens_per_step_second,
    )


async def send(client: AsyncClient, answer: Answer, started: float) -> None:
    ask = answer.ask
    await asyncio.sleep(started + ask.at - time.perf_counter())
    try:
        async for message in client.stream_generate(
            ask.prompt, temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True, timeout=ask.deadline
        ):
            if answer.first_token is None and any(delta.token_ids for delta in message.completions):
                answer.first_token = time.perf_counter() - started
        kind = "good"
    except ResourceExhausted:
        kind = "refused"
    except DeadlineExceeded:
        kind = "missed"
    answer.kind, answer.ended = kind, time.perf_counter() - started


async def watched(server: Server, watch: Watch) -> None:
    """Looks at the server once a second, for ever."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    before = await asyncio.to_thread(server.metrics)
    while True:
        watch.rss = max(watch.rss, sum(process.memory_info().rss for process in processes))
        metrics = await asyncio.to_thread(server.metrics)
        watch.most_waiting = max(watch.most_waiting, int(metrics.get("salver_num_requests_waiting", 0)))
        seconds = metrics[STEP_SECONDS] - before[STEP_SECONDS]
        if seconds > 0:
            watch.tokens_per_step_second = (metrics[STEP_TOKENS] - before[STEP_TOKENS]) / seconds
        await asyncio.sleep(1.0)


def busy(server: Server) -> bool:
    now = server.metrics()
    return bool(now["salver_num_requests_running"] or now["salver_num_requests_waiting"])


async def offer(server: Server, rate: float, requests: Sequence[Ask], begin: float, end: float) -> Measured:
    """One point: sends the requests, and ends what is left when its time is over. Raises SalverError."""
    options = ConnectionOptions(max_attempts=1, resume_attempts=0)
    async with AsyncClient(server.address, options=options) as client:
        await client.server_info()
        watch = Watch()
        watching = asyncio.create_task(watched(server, watch))
        answers = [Answer(ask) for ask in requests]
        started = time.perf_counter()
        sending = [asyncio.create_task(send(client, answer, started)) for answer in answers]
        await asyncio.wait(sending, timeout=end)
        result = measured(rate, answers, begin, end, watch)
        for task in (watching, *sending):
            task.cancel()
        for outcome in await asyncio.gather(*sending, return_exceptions=True):
            if isinstance(outcome, SalverError):
                raise outcome  # neither refused nor late: that is no load, but a fault
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    while await asyncio.to_thread(busy, server):  # noqa: ASYNC110 - a look at another process
        await asyncio.sleep(0.1)
    return result


class Bench:
    """Offers rates to a server and tells what came of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.trace = read_trace(TRACE_SAMPLE)
        self.vocabulary = 0

    def point(self, server: Server, rate: float, warm_up: float, seconds: float) -> Measured:
        """Raises BenchError."""
        end = warm_up + seconds
        requests = list(asks(self.trace, self.args, rate, end, self.vocabulary))
        try:
            result = asyncio.run(offer(server, rate, requests, warm_up, end))
        except SalverError as error:
            raise BenchError(f"{type(error).__name__}: {error}") from error
        print(
            f"{rate:.2f} requests/s: {result.goodput:.2f} good, {result.refused} refused, "
            f"{result.missed} missed, client {result.client_cpu:.0%}", file=sys.stderr, flush=True,
        )  # fmt: skip
        return result

    def capacity(self, server: Server) -> float:
        """The best goodput of rising rates, up to the first that does clearly worse."""
        best, rate = 0.0, self.args.ramp_start
        for _ in range(RAMP_MOST):
            seconds = self.args.ramp_seconds
            goodput = self.point(server, rate, seconds / 2, seconds).goodput
            if goodput < WORSE * best:  # twice, or it was only a slow moment of the machine
                goodput = max(goodput, self.point(server, rate, seconds / 2, seconds).goodput)
                if goodput < WORSE * best:
                    break
            best = max(best, goodput)
            rate *= RAMP_FACTOR
        if not best:
            raise BenchError(f"not one request was answered in time at {self.args.ramp_start}/s")
        return best

    def run(self) -> tuple[float, dict[str, list[Measured]]]:
        """The capacity, and both curves. Raises BenchError."""
        args = self.args
        curves: dict[str, list[Measured]] = {WITH: [], WITHOUT: []}
        # Both servers are there all the time and take turns: a machine has slow minutes, and an idle
        # server costs nothing.
        with self.server("--no-deadline-admission") as plain, self.server() as refusing:
            capacity = self.capacity(plain)
            servers = {"on": (WITH, refusing), "off": (WITHOUT, plain)}
            for factor in args.factors:
                for name, server in (servers[mode] for mode in args.modes):
                    curves[name].append(self.at(server, factor * capacity))
        return capacity, curves

    def at(self, server: Server, rate: float) -> Measured:
        return self.point(server, rate, self.args.warm_up, self.args.seconds)

    @contextlib.contextmanager
    def server(self, *flags: str) -> Iterator[Server]:
        args = self.args
        with Server(
            args.model, dtype=args.dtype, threads=args.threads, extra=[*args.serve_arg, *flags]
        ) as server:
            server.start()
            self.vocabulary = about(server).vocab_size
            self.point(server, 1.0, 0.0, 4.0)  # warm: the first steps, and the first speeds
            yield server


def table(curve: Sequence[Measured], capacity: float, peak: float) -> str:
    def shown(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    rows = [
        f"| {m.rate / capacity:.1f}x | {m.rate:.2f} | {m.goodput:.2f} | {m.goodput / peak:.0%} "
        f"| {m.good_tokens_per_second:.0f} | {m.refused} | {m.missed} "
        f"| {shown(m.ttft_p50)}, {shown(m.ttft_p99)} | {shown(m.refusal_p99, 1000, 0)} "
        f"| {m.most_waiting} | {m.rss / 1e6:.0f} | {m.client_cpu:.0%} "
        f"| {m.tokens_per_step_second:.0f} |"
        for m in curve
    ]
    return "\n".join([HEADER, *rows])


def report(args: argparse.Namespace, capacity: float, curves: dict[str, list[Measured]]) -> bool:
    """Prints the tables and writes the files; whether the bar is kept at twice the capacity."""
    header = machine.header(ROOT)
    # Beyond twice the capacity, who is still taken has a short answer: more requests, not more work.
    upto = [m.goodput for curve in curves.values() for m in curve if m.rate <= 2.001 * capacity]
    peak = max([capacity, *upto])
    print(f"{header['cpu']}, {header['cores']} cores; commit {header['commit']}, {header['date']}")
    print(f"{args.dtype}; capacity {capacity:.2f} requests/s, peak up to twice that {peak:.2f}")
    print(f"deadlines {args.slack:g} s and {args.slack_per_token:g} s a token; {args.seconds:g} s a point\n")
    for name, curve in curves.items():
        if curve:
            print(f"{name}:\n\n{table(curve, capacity, peak)}\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": header, "capacity": capacity, "arguments": {"seed": args.seed, "dtype": args.dtype,
            "shrink": args.shrink, "slack": args.slack, "slack_per_token": args.slack_per_token},
            "curves": {name: [asdict(m) for m in curve] for name, curve in curves.items()},
        }  # fmt: skip
        (args.out / "overload.json").write_text(json.dumps(data, indent=1) + "\n")
        lines = {
            name: [(m.rate / capacity, m.goodput) for m in curve] for name, curve in curves.items() if curve
        }
        title = f"Goodput under overload ({args.model}, {header['cores']} cores, {header['date'][:10]})"
        svg = chart(
            title, "offered load, multiples of the capacity", "requests/s within their deadline", lines
        )
        (args.out / "overload.svg").write_text(svg)
    double = [m.goodput for m in curves[WITH] if round(m.rate / capacity, 3) == 2.0]
    return not double or min(double) >= BAR * peak


def main() -> int:
    """1 where the goodput at twice the capacity, with refusals, is below the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--serve-arg", action="append", default=[])
    parser.add_argument("--deadline-admission", dest="modes", choices=("on", "off", "both"), default="both")
    parser.add_argument("--factors", default="0.5,1,1.5,2,3,5", help="multiples of the capacity")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured, of each point")
    parser.add_argument("--warm-up", type=float, default=6.0, help="before them, of each point")
    parser.add_argument("--ramp-seconds", type=float, default=8.0, help="of each rate of the ramp")
    parser.add_argument("--ramp-start", type=float, default=RAMP_START, help="requests a second")
    parser.add_argument("--shrink", type=float, default=16.0, help="the trace's lengths are divided by this")
    parser.add_argument("--slack", type=float, default=2.5, help="seconds of every deadline")
    parser.add_argument("--slack-per-token", type=float, default=0.1, help="more, for each output token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where overload.json and overload.svg are written")
    args = parser.parse_args()
    args.factors = [float(factor) for factor in args.factors.split(",")]
    args.modes = {"both": ("on", "off")}.get(args.modes, (args.modes,))
    try:
        capacity, curves = Bench(args).run()
    except BenchError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0 if report(args, capacity, curves) else 1


if __name__ == "__main__":
    raise SystemExit(main())
