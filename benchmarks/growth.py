"""How cost grows: a step with its batch and context, with what waits; memory; streams while prompts arrive.

Steps are timed in process. Memory and the gaps between tokens are those of a served engine. Prints tables.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import machine
from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.figures import percentile
from benchmarks.processes import Server, memory_of
from salver.client import AsyncClient

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
STREAMS = 8
IDS = (256, 40_000)
PARTS = ("steps", "arrivals", "memory")


def prompt(length: int, draw: random.Random) -> list[int]:
    return [draw.randrange(*IDS) for _ in range(length)]


# ---- steps, in process ----


def steps(args: argparse.Namespace) -> None:
    """In a process of its own: two engines in one would share its threads."""
    command = [sys.executable, __file__, "--parts", "inline-steps", "--model", args.model]
    subprocess.run([*command, "--dtype", args.dtype, "--threads", str(args.threads)], check=True)


def inline_steps(args: argparse.Namespace) -> None:
    from benchmarks.inline_engine import request, start
    from salver.server.engine.core import EngineCore

    checkpoint = checkpoint_of(args.model, args.dtype, default_cache_dir())
    core, ready = start(
        checkpoint, dtype=args.dtype, threads=args.threads, max_num_seqs=32, enable_prefix_caching=True,
        kv_cache_memory=1 << 30,
    )  # fmt: skip
    draw = random.Random(0)

    def clear(core: EngineCore) -> None:
        for number in [s.request.request_id for s in core.scheduler.unfinished()]:
            core.abort(number)

    def step_ms(batch: int, context: int, waiting: int = 0) -> float:
        """Median of a decoding step.

        Prompts are computed one by one and then found in the prefix cache: together, the first ones
        would have ended before the last is computed.
        """
        clear(core)
        prompts = [prompt(context, draw) for _ in range(batch)]
        for tokens in prompts:
            core.add(request(0, tokens, 1))
            while core.has_work:
                core.step()
        for number, tokens in enumerate(prompts):
            core.add(request(number, tokens, STEPS + 40))
        while any(s.num_tokens - s.num_computed_tokens > 1 for s in core.scheduler.unfinished()):
            core.step()
        if ended := batch - len(list(core.scheduler.unfinished())):
            raise SystemExit(f"{ended} of {batch} sequences ended before their steps were timed")
        for number in range(waiting):
            core.add(request(1000 + number, [300] * 100, 8))
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            core.step()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    print(f"kernels {ready.kernels}; token budget {ready.max_num_batched_tokens}, "
          f"{core.limits.tokens_for_one} tokens for the time of one\n")  # fmt: skip
    contexts = (64, 512, 1500)
    print("| decoding at once | " + " | ".join(f"context {c}, ms" for c in contexts) + " |")
    print("|---|" + "---|" * len(contexts))
    for batch in (1, 4, 8, 16, 32):
        row = (f"{step_ms(batch, context):.1f}" if batch * context < 20_000 else "" for context in contexts)
        print(f"| {batch} | " + " | ".join(row) + " |", flush=True)
    print("\n| waiting | step of 32 at context 64, ms |\n|---|---|")
    for waiting in (0, 100, 10_000):
        print(f"| {waiting} | {step_ms(32, 64, waiting):.1f} |", flush=True)
    print()


# ---- through the network ----


async def stream(client: AsyncClient, tokens: list[int], max_tokens: int, times: list[float]) -> None:
    """Appends when each message with a token came."""
    async for message in client.stream_generate(
        tokens, temperature=0.0, max_tokens=max_tokens, ignore_eos=True, timeout=600.0
    ):
        if any(delta.token_ids for delta in message.completions):
            times.append(time.perf_counter())


async def arriving(address: str, seconds: float, length: int) -> tuple[list[float], list[float]]:
    """Gaps of STREAMS streams while prompts of this length (0: none) come one after the other, and the
    times to their first tokens."""
    draw = random.Random(length)
    async with AsyncClient(address) as client:
        times: list[list[float]] = [[] for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(stream(client, prompt(64, draw), int(seconds * 60), found)) for found in times
        ]
        while not all(times):  # noqa: ASYNC110 - a client's look at lists that streams fill
            await asyncio.sleep(0.05)
        begin = time.perf_counter()
        firsts: list[float] = []
        while time.perf_counter() < begin + seconds:
            if not length:
                await asyncio.sleep(seconds)
                continue
            sent, first = time.perf_counter(), []
            await stream(client, prompt(length, draw), 1, first)
            firsts.append(first[0] - sent)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    between = [b - a for found in times for a, b in itertools.pairwise(found) if a >= begin]
    return between, firsts


def arrivals(args: argparse.Namespace) -> None:
    print(
        f"| {STREAMS} streams, and | ITL p50 | p95 | p99 | TTFT of the prompts, median |"
        "\n|---|---|---|---|---|"
    )
    with Server(args.model, dtype=args.dtype, threads=args.threads, extra=args.serve_arg) as server:
        server.start()
        asyncio.run(arriving(server.address, 2.0, 512))  # warm
        p99 = []
        for length in (0, 1500):
            between, firsts = asyncio.run(arriving(server.address, args.seconds, length))
            row = [percentile(between, q) for q in (50, 95, 99)]
            p99.append(row[-1])
            name = f"prompts of {length}, one after the other" if length else "nothing else"
            first = f"{statistics.median(firsts):.2f} s" if firsts else ""
            print(
                f"| {name} | " + " | ".join(f"{1e3 * ms:.1f} ms" for ms in row) + f" | {first} |", flush=True
            )
    print(f"\np99 ITL: {p99[1] / p99[0]:.2f} times that without prompts\n")


async def load(address: str, seconds: float, pid: int) -> list[tuple[float, int]]:
    """Requests of mixed lengths, 16 at any time; (second, resident bytes) about ten times."""
    draw = random.Random(1)
    begin = time.perf_counter()
    found: list[tuple[float, int]] = []

    async def ask(client: AsyncClient) -> None:
        while time.perf_counter() < begin + seconds:
            await stream(client, prompt(draw.randint(16, 400), draw), draw.randint(1, 64), [])

    async with AsyncClient(address) as client:
        asking = [asyncio.create_task(ask(client)) for _ in range(16)]
        while time.perf_counter() < begin + seconds:
            await asyncio.sleep(seconds / 10)
            found.append((time.perf_counter() - begin, memory_of(pid).rss))
        await asyncio.gather(*asking)
    return found


def memory(args: argparse.Namespace) -> None:
    with Server(args.model, dtype=args.dtype, threads=args.threads, extra=args.serve_arg) as server:
        server.start()
        print(
            f"| seconds under load | resident MB |\n|---|---|\n| 0 | {memory_of(server.pid).rss / 1e6:.0f} |"
        )
        for second, rss in asyncio.run(load(server.address, args.memory_seconds, server.pid)):
            print(f"| {second:.0f} | {rss / 1e6:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--parts", default=PARTS, type=lambda text: text.split(","), help=f"of {PARTS}")
    parser.add_argument("--seconds", type=float, default=20.0, help="of streams with and without prompts")
    parser.add_argument("--memory-seconds", type=float, default=150.0)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--serve-arg", action="append", default=[])
    args = parser.parse_args()
    measures = {"steps": steps, "inline-steps": inline_steps, "arrivals": arrivals, "memory": memory}
    if unknown := [name for name in args.parts if name not in measures]:
        parser.error(f"--parts: unknown {', '.join(unknown)}")
    if "inline-steps" not in args.parts:
        about = machine.header(ROOT)
        print(f"{about['cpu']}, {about['cores']} cores; commit {about['commit']}, {about['date']}")
        print(f"{args.dtype}\n", flush=True)
    for name in args.parts:
        measures[name](args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
