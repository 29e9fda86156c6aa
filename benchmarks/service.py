"""What the service costs: throughput through gRPC over that of the same engine driven in process.

Both run on this machine in one run, taking turns. The client of the served side shares the cores too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import machine
from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.figures import BenchError, Run, summarize
from benchmarks.measure import about, run_point
from benchmarks.processes import Baseline, Server
from benchmarks.workload import POINTS, make_requests

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.95
HEADER = (
    "| point | through gRPC, tokens/s | in process, tokens/s | ratio | steps' share of the served time |\n"
    "|---|---|---|---|---|"
)


def measure(args: argparse.Namespace) -> dict[str, list[tuple[Run, Run]]]:
    """Of each point, the pairs of runs: served, in process. Raises BenchError."""
    pairs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in args.points}
    cache_dir = default_cache_dir()
    quantized = ("--quantization", args.quantization)
    extra = (*quantized, *args.serve_arg)
    with Server(args.model, dtype=args.dtype, threads=args.threads, extra=extra) as server:
        server.start()
        vocabulary = about(server).vocab_size
        checkpoint = checkpoint_of(args.model, args.dtype, cache_dir)
        with Baseline(
            checkpoint, dtype=args.dtype, threads=args.threads, script="inline_engine.py", extra=quantized
        ) as engine:
            for repeat in range(-1, args.repeats):  # the first is a warm-up
                for name in args.points:
                    point = POINTS[name]
                    requests = make_requests(point, seed=args.seed, repeat=repeat, vocab_size=vocabulary)

                    def served(point=point, requests=requests) -> Run:  # type: ignore[no-untyped-def]
                        return run_point(server, point, requests)

                    def inside(point=point, requests=requests) -> Run:  # type: ignore[no-untyped-def]
                        return summarize(point, requests, *engine.run(requests))

                    if repeat % 2:
                        theirs, ours = inside(), served()
                    else:
                        ours, theirs = served(), inside()
                    if ours.token_ids != theirs.token_ids:
                        raise BenchError(f"{name}: the two sides gave different tokens")
                    if repeat >= 0:
                        pairs[name].append((ours, theirs))
    return pairs


def main() -> int:
    """1 where a ratio is below the bar at 32 at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--points", default="decode_1,batch_16,batch_32", type=lambda text: text.split(","))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--serve-arg", action="append", default=[])
    args = parser.parse_args()
    try:
        pairs = measure(args)
    except BenchError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    about_machine = machine.header(ROOT)
    precision = args.dtype if args.quantization == "none" else args.quantization
    print(f"{about_machine['cpu']}, {about_machine['cores']} cores; commit {about_machine['commit']}, "
          f"{about_machine['date']}; {precision}, medians of {args.repeats}\n")  # fmt: skip
    print(HEADER)
    missed = False
    for name, runs in pairs.items():
        ours = statistics.median(run.tokens_per_second for run, _ in runs)
        theirs = statistics.median(run.tokens_per_second for _, run in runs)
        ratio = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in runs)
        share = statistics.median(run.notes.get("steps_share_of_wall", float("nan")) for run, _ in runs)
        missed = missed or (name == "batch_32" and ratio < BAR)
        print(f"| {POINTS[name].title} | {ours:.1f} | {theirs:.1f} | {ratio:.3f} | {share:.3f} |")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
