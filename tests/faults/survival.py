"""Streams that survive: several servers, some killed, all restarted, and every answer as if nothing were.

By hand, longer: PYTHONPATH=tests python -m faults.survival --streams 100 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.serving import Server, wait_until

from salver.client import AsyncClient, Client, GenerateResult

START = Callable[..., Server]
NUM_TOKENS = 400
TIMEOUT = 240.0


@dataclass
class Outcome:
    """What became of the streams of one run."""

    streams: int
    resumptions: int
    wrong: list[str]  # one line for every stream that was lost or is not what it would have been


class Load:
    """Streams of every kind, half of them of each client, over and over until `enough` is set."""

    def __init__(self, addresses: Sequence[str], streams: int, seed: int) -> None:
        draw = random.Random(seed)
        self.addresses = list(addresses)
        self.requests = [self._request(draw, index) for index in range(streams)]
        self.enough = threading.Event()

    @staticmethod
    def _request(draw: random.Random, index: int) -> tuple[str, dict[str, Any]]:
        options: dict[str, Any] = {
            "max_tokens": draw.randrange(NUM_TOKENS // 2, NUM_TOKENS),
            "ignore_eos": True,
            "timeout": TIMEOUT,
            "temperature": 0.0,
            "seed": draw.randrange(1, 1 << 31),
        }
        if index % 4 > 1:
            options |= {"temperature": 1.0, "top_p": 0.95}
        if index % 5 == 3:
            options |= {"n": 2, "logprobs": 2, "prompt_logprobs": 1}
        return f"stream {draw.randrange(1000)}:", options

    def undisturbed(self) -> list[GenerateResult]:
        with Client(self.addresses) as client, ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda r: client.generate(r[0], **r[1]), self.requests))

    def run(self) -> list[tuple[int, GenerateResult, int]]:
        """(request, answer, resumptions) of every stream; raises what one of them raised."""
        found: list[tuple[int, GenerateResult, int]] = []
        even = range(0, len(self.requests), 2)
        odd = range(1, len(self.requests), 2)
        with Client(self.addresses) as client, ThreadPoolExecutor(len(even) + 1) as pool:

            def read(index: int) -> None:
                prompt, options = self.requests[index]
                while True:
                    with client.stream_generate(prompt, **options) as stream:
                        for _ in stream:
                            pass
                        found.append((index, stream.result, stream.resumptions))
                    if self.enough.is_set():
                        return

            asynchronous = pool.submit(lambda: asyncio.run(self._asynchronous(odd, found)))
            for future in [*[pool.submit(read, index) for index in even], asynchronous]:
                future.result()
        return found

    async def _asynchronous(self, indices: range, found: list[tuple[int, GenerateResult, int]]) -> None:
        async with AsyncClient(self.addresses) as client:

            async def read(index: int) -> None:
                prompt, options = self.requests[index]
                while True:
                    async with client.stream_generate(prompt, **options) as stream:
                        async for _ in stream:
                            pass
                        found.append((index, stream.result, stream.resumptions))
                    if self.enough.is_set():
                        return

            async with asyncio.TaskGroup() as group:
                for index in indices:
                    group.create_task(read(index))


def plain(result: GenerateResult) -> GenerateResult:
    """What must be equal: all but whose request it was, how long it took, what a cache knew."""
    usage = result.usage and replace(result.usage, cached_tokens=0)
    return replace(result, request_id="", timings=None, usage=usage)


def disturbed(load: Load, disturb: Callable[[Load], None]) -> Outcome:
    """Runs the load once in peace and once while `disturb` does what it does, and compares."""
    expected = load.undisturbed()
    load.enough.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load.run)
        try:
            disturb(load)
        finally:
            load.enough.set()
        came = running.result(TIMEOUT)
    wrong = [
        f"{load.requests[index]}: {plain(result)} is not {plain(expected[index])}"
        for index, result, _ in came
        if plain(result) != plain(expected[index])
    ]
    return Outcome(len(came), sum(resumptions for _, _, resumptions in came), wrong)


def wait_until_busy(server: Server, requests: int) -> None:
    wait_until("a busy server", lambda: server.occupancy()[0] >= requests, 120)


def kill_one(servers: list[Server]) -> Callable[[Load], None]:
    """SIGKILL to one server and its worker, while it runs its share of the streams."""

    def disturb(load: Load) -> None:
        wait_until_busy(servers[0], len(load.requests) // 6)
        servers[0].kill()

    return disturb


def rolling_restart(begin: Callable[..., Server], servers: list[Server]) -> Callable[[Load], None]:
    """SIGTERM to one after the other, and a new one on its port before the next."""

    def disturb(load: Load) -> None:
        for index, server in enumerate(servers):
            wait_until_busy(server, 1)
            port = server.address.rpartition(":")[2]
            assert server.stop(signal.SIGTERM) == 0, server.log
            servers[index] = begin("--port", port)

    return disturb


def survive(
    start: START, checkpoint: Path, *, streams: int, seed: int, num_servers: int = 3
) -> dict[str, Outcome]:
    """Several servers: one is killed, then all are restarted in turn. `start` as the fixture start_server."""

    def begin(*flags: str) -> Server:
        return start(checkpoint, "--drain-period", "0.3s", *flags)

    servers = [begin() for _ in range(num_servers)]
    load = Load([server.address for server in servers], streams, seed)
    outcomes = {"kill": disturbed(load, kill_one(servers))}
    servers[0] = begin("--port", servers[0].address.rpartition(":")[2])
    outcomes["rolling restart"] = disturbed(load, rolling_restart(begin, servers))
    return outcomes


def main() -> int:
    from support.checkpoints import write_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started: list[Server] = []

    def start(model: Path, *flags: str) -> Server:
        started.append(Server(str(model), "--dtype", "float32", "--threads", "1", *flags))
        return started[-1].wait_serving()

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_tiny_llama(Path(directory) / "long-llama", context=8192)
        try:
            outcomes = survive(start, checkpoint, streams=options.streams, seed=options.seed)
        finally:
            for server in started:
                server.kill()
    for name, outcome in outcomes.items():
        print(
            f"{name}: {outcome.streams} streams, {outcome.resumptions} resumptions, {len(outcome.wrong)} lost"
        )
        print(*outcome.wrong, sep="\n", end="")
    return int(any(outcome.wrong for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
