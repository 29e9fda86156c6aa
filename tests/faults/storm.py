"""A storm of calls that end early, in every phase and in every way, beside calls that must not notice.

    PYTHONPATH=tests python -m faults.storm --seed 1 --calls 1000           (`make faults`)
    PYTHONPATH=tests python -m faults.storm --minutes 60 --worker-faults    (`make soak`)

A call is cancelled, runs into its deadline, or its client vanishes: at once, while it waits, in its
prompt, in its output, at its end. Meanwhile others ask the same things over and over, and every
answer is compared with that of a server at rest. In between the storm holds its breath: then
nothing runs, waits or is owned, and a request that needs every block of the cache has it.
What a seed draws is the same again; when it strikes is up to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from faults.relay import VANISHING, Relay
from faults.survival import plain
from support import calls
from support.serving import Server

from salver.client import AsyncClient
from salver.v1 import generation_pb2, generation_pb2_grpc

CACHE_TOKENS = 2048
BLOCK_SIZE = 16
# Fewer seats, blocks and tokens a step than the storm wants, so that calls wait, prompts take many
# steps and sequences are preempted; and hardly more places in the queue than it can fill, so that
# one that is not given back is missed. Deadlines are to pass in every phase: none is refused for its own.
FLAGS = (
    "--no-deadline-admission",
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "32", "--max-queued-requests", "48"),
    *("--kv-cache-memory", str(CACHE_TOKENS * 512)),
)
STEPS = "salver_step_duration_seconds_count"
AT_ONCE = 20  # calls of the storm under way
# That may still end between the end of all calls and our look: what is not freed takes hundreds.
LATE_STEPS = 60
PATIENCE = 120.0  # seconds that nothing here takes
METHODS = ("Generate", "StreamGenerate", "Chat", "StreamChat", "Score")
STREAMS = ("StreamGenerate", "StreamChat")
MOMENTS = ("at once", "waiting", "prompt", "output", "end")
LOWEST, HIGHEST = -10, 10  # priorities: never started while others wait, and next


@dataclass
class Victim:
    """One call of the storm, as drawn."""

    method: str
    way: str  # cancel, deadline, or one of VANISHING
    moment: str
    prompt_tokens: int
    max_tokens: int
    n: int
    messages: int  # of a stream, after which its end comes, where that is to be in the output
    patience: float  # seconds until its end comes, where no message tells the moment; or its deadline
    seed: int

    @classmethod
    def draw(cls, rng: random.Random) -> Victim:
        moment = rng.choice(MOMENTS)
        way = rng.choice(("cancel", "cancel", "deadline", "vanish"))
        late = moment in ("output", "end")
        method = rng.choice(STREAMS if late and rng.random() < 0.7 else METHODS)
        longest = {"at once": 0.0, "waiting": 0.2, "prompt": 0.4}.get(moment, 3.0)
        told = late and method in STREAMS and way != "deadline"
        return cls(
            method=method,
            way=rng.choice(VANISHING) if way == "vanish" else way,
            moment=moment,
            prompt_tokens=rng.randint(400, 900) if moment == "prompt" else rng.randint(1, 100),
            max_tokens=rng.randint(2, 20) if moment == "end" else rng.randint(300, 1000),
            n=rng.choice((1, 1, 1, 2, 4)),
            messages=rng.randint(1, 10),
            patience=PATIENCE if told else longest * rng.random(),
            seed=rng.getrandbits(31),
        )

    @property
    def allowed(self) -> set[grpc.StatusCode]:
        """How it may end: as it was meant to, or just before."""
        code = grpc.StatusCode
        if self.way == "cancel":
            return {code.OK, code.CANCELLED}
        if self.way == "deadline":  # a server that sees that it cannot keep it may say so
            return {code.OK, code.DEADLINE_EXCEEDED, code.RESOURCE_EXHAUSTED}
        return {code.OK, code.CANCELLED, code.UNAVAILABLE, code.DEADLINE_EXCEEDED}

    @property
    def timeout(self) -> float:
        if self.way == "deadline":
            return max(0.001, self.patience)
        # Of a client that falls silent the server learns by the deadline, or by pings after a minute.
        return min(self.patience, 0.7) + 0.3 if self.way == "falls silent" else PATIENCE

    def request(self) -> Any:
        rng = random.Random(self.seed)
        ids = [rng.randrange(2, 200) for _ in range(self.prompt_tokens)]
        priority = {"waiting": LOWEST, "prompt": HIGHEST}.get(self.moment, 0)
        if self.method == "Score":
            split = max(1, len(ids) // 2)
            inputs = [
                generation_pb2.ScoreInput(
                    context=calls.prompt_of(ids[:split]), continuation=calls.prompt_of([*ids[split:], 7])
                )
            ]
            return generation_pb2.ScoreRequest(inputs=inputs * self.n, priority=priority)
        fields: dict[str, Any] = {
            "max_tokens": self.max_tokens, "n": self.n, "temperature": 1.0, "seed": self.seed,
            "priority": priority, "ignore_eos": True,
        }  # fmt: skip
        if "Chat" in self.method:
            kind = generation_pb2.StreamChatRequest if "Stream" in self.method else generation_pb2.ChatRequest
            turn = generation_pb2.Message(role=generation_pb2.ROLE_USER, content="x" * self.prompt_tokens)
            return kind(messages=[turn], **calls.parameters(fields))
        make = calls.stream_request if "Stream" in self.method else calls.generate_request
        return make(ids, **fields)


@dataclass
class Report:
    """What was tried and what was lost."""

    tried: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    late: list[tuple[float, int]] = field(default_factory=list)  # seconds and steps to empty, every pause
    memory: list[tuple[float, float]] = field(default_factory=list)  # MiB of the front, of the worker

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))

        front = " ".join(f"{of_front:.0f}" for of_front, _ in self.memory)
        worker = " ".join(f"{of_worker:.0f}" for _, of_worker in self.memory)
        return "\n".join([
            f"tried: {listed(self.tried)}",
            f"ended: {listed(self.ended)}",
            f"pauses: {len(self.late)}; empty after at most {max(s for s, _ in self.late):.2f} s and "
            f"{max(steps for _, steps in self.late)} steps",
            f"memory (MiB): front {front}; worker {worker}",
            f"lost: {len(self.lost)}",
            *self.lost[:20],
        ])  # fmt: skip


class Neighbours:
    """Calls of every kind whose answers are known, asked again and again."""

    KINDS: tuple[dict[str, Any], ...] = (
        {"max_tokens": 90, "seed": 2},
        {"max_tokens": 120, "temperature": 1.0, "top_p": 0.95, "seed": 3},
        {"max_tokens": 70, "temperature": 0.9, "n": 2, "seed": 4, "logprobs": 2, "prompt_logprobs": 1},
        {"max_tokens": 80, "temperature": 1.0, "seed": 5, "repetition_penalty": 1.1},
    )

    def __init__(self, address: str, report: Report) -> None:
        self._client = AsyncClient(address)
        self._report = report
        self._expected: list[Any] = []

    def _questions(self) -> list[Callable[[], Awaitable[Any]]]:
        client = self._client

        async def streamed(index: int, options: dict[str, Any]) -> Any:
            begin = client.stream_chat if index == 3 else client.stream_generate
            async with begin(f"neighbour {index}: " * 3, **options) as stream:
                async for _ in stream:
                    pass
                self._report.tried["resumptions of neighbours"] += stream.resumptions
                return plain(stream.result)

        async def whole(index: int, options: dict[str, Any]) -> Any:
            ask = client.chat if index == 3 else client.generate
            return plain(await ask(f"neighbour {index}: " * 3, **options))

        async def scored() -> Any:
            return await client.score([("one " * 30, "two"), ("three", "four " * 20)], timeout=PATIENCE)

        questions: list[Callable[[], Awaitable[Any]]] = [scored]
        for index, kind in enumerate(self.KINDS):
            options = {"temperature": 0.0, "ignore_eos": True, "timeout": PATIENCE, **kind}
            for way in (streamed, whole):
                questions.append(lambda way=way, i=index, o=options: way(i, o))
        return questions

    async def learn(self) -> None:
        """Asks everything once, one after the other, of a server at rest."""
        self._expected = [await ask() for ask in self._questions()]

    async def ask_until(self, enough: asyncio.Event) -> None:
        async def again(index: int, ask: Callable[[], Awaitable[Any]]) -> None:
            while not enough.is_set():
                self._report.tried["answers of neighbours"] += 1
                try:
                    answer = await ask()
                except Exception as error:
                    self._report.lost.append(f"neighbour {index}: {error!r}")
                else:
                    if answer != self._expected[index]:
                        lost = f"neighbour {index}: {answer} is not {self._expected[index]}"
                        self._report.lost.append(lost)

        questions = self._questions()
        await asyncio.gather(*(again(index, ask) for index, ask in enumerate(questions)))

    async def close(self) -> None:
        await self._client.close()


class Storm:
    """The calls that end early, against one server."""

    def __init__(self, server: Server, seed: int, *, worker_faults: bool = False) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.report = Report()
        self.worker_faults = worker_faults
        self.host, _, port = server.address.rpartition(":")
        self.port = int(port)

    async def run(self, total: int, minutes: float, pause_every: int) -> Report:
        """`total` calls, or as many as come in so many minutes; a pause after every `pause_every`."""
        end = time.monotonic() + 60 * minutes
        neighbours = Neighbours(self.server.address, self.report)
        channels = [self._channel(self.server.address) for _ in range(3)]
        try:
            await neighbours.learn()
            done = 0
            while done < total or time.monotonic() < end:
                count = pause_every if minutes else min(pause_every, total - done)
                enough = asyncio.Event()
                asking = asyncio.create_task(neighbours.ask_until(enough))
                faults = asyncio.create_task(self._harm_worker(enough))
                await asyncio.gather(self._victims(count, channels), self._kill_a_client(done))
                enough.set()
                await asyncio.gather(asking, faults)
                await self._hold_breath()
                done += count
        finally:
            await neighbours.close()
            for channel in channels:
                await channel.close()
        return self.report

    @staticmethod
    def _channel(address: str) -> grpc.aio.Channel:
        # Not one connection for all of them; and what UNAVAILABLE ends stays ended.
        return grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        )

    async def _victims(self, count: int, channels: list[grpc.aio.Channel]) -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(victim: Victim, channel: grpc.aio.Channel) -> None:
            async with places:
                await self._end_early(victim, channel)

        drawn = [Victim.draw(self.rng) for _ in range(count)]
        await asyncio.gather(*(one(v, channels[i % len(channels)]) for i, v in enumerate(drawn)))

    async def _end_early(self, victim: Victim, channel: grpc.aio.Channel) -> None:
        self.report.tried[victim.way] += 1
        self.report.tried[victim.method] += 1
        self.report.tried[f"aimed at: {victim.moment}"] += 1
        relay = None
        if victim.way in VANISHING:
            relay = Relay(self.host, self.port)
            channel = self._channel(await relay.open())
        try:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            deadline = time.monotonic() + victim.timeout
            call = getattr(stub, victim.method)(victim.request(), timeout=victim.timeout)
            moment = asyncio.Event()
            reading = asyncio.create_task(self._read(victim, call, moment))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(moment.wait(), victim.patience)
            if relay is not None:
                await relay.vanish(victim.way)
            if victim.way != "deadline":
                call.cancel()  # of one that has vanished, nobody hears it
            tokens = await reading
            code = await call.code()
            if victim.way == "falls silent":
                await asyncio.sleep(max(0.0, deadline - time.monotonic()))
        finally:
            if relay is not None:
                await channel.close()
                await relay.close()
        self.report.ended[code.name] += 1
        if code is not grpc.StatusCode.OK:
            self.report.ended["in the output" if tokens else "before a token"] += 1
        if code not in victim.allowed and not (self.worker_faults and code is grpc.StatusCode.UNAVAILABLE):
            self.report.lost.append(f"{victim} ended {code.name}: {await call.details()}")

    @staticmethod
    async def _read(victim: Victim, call: Any, moment: asyncio.Event) -> int:
        """Reads all there is; sets `moment` when the call is where its end shall come. Its tokens."""
        tokens = messages = 0
        last = victim.max_tokens * victim.n
        try:
            if "Stream" not in victim.method:
                await call
                return 0
            async for message in call:
                tokens += sum(len(delta.token_ids) for delta in message.completions)
                messages += 1
                in_output = victim.moment == "output" and messages >= victim.messages
                if in_output or (victim.moment == "end" and tokens >= last - victim.n):
                    moment.set()
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        finally:
            moment.set()
        return tokens

    async def _kill_a_client(self, number: int) -> None:
        """A process with streams under way, gone by SIGKILL."""
        streams, client = 4, Path(__file__).with_name("doomed_client.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(client), self.server.address, str(streams),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            said = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
            if said != b"running\n" and not self.worker_faults:
                self.report.lost.append(f"the client that was to be killed after {number} calls did not run")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.report.tried["streams of killed clients"] += streams

    async def _harm_worker(self, enough: asyncio.Event) -> None:
        """Now and then: SIGKILL, or SIGSTOP for as long as makes a stall."""
        while self.worker_faults:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), self.rng.uniform(0.5, 8.0))
            if enough.is_set():
                return
            worker = await asyncio.to_thread(lambda: self.server.worker)
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.rng.random() < 0.5:
                    worker.kill()
                    self.report.tried["workers killed"] += 1
                else:
                    worker.suspend()
                    await asyncio.sleep(self.rng.uniform(0.1, 4.0))
                    worker.resume()
                    self.report.tried["workers stopped"] += 1

    async def _hold_breath(self) -> None:
        await asyncio.to_thread(self._check_empty)

    def _check_empty(self) -> None:
        server, report = self.server, self.report
        begin, before = time.monotonic(), server.metric(STEPS)
        server.wait_idle(PATIENCE)
        steps = int(server.metric(STEPS) - before)
        report.late.append((time.monotonic() - begin, steps))
        if steps > LATE_STEPS:
            report.lost.append(f"{steps} steps for calls that had ended")
        # Every block of the cache in one request, prompt and output; less the room for one token.
        prompt = [9] * (CACHE_TOKENS - 2 * BLOCK_SIZE - 20)
        if len(server.tokens(prompt, max_tokens=20, ignore_eos=True, cache_salt="all")) != 20:
            report.lost.append("a request that needs the whole cache")
        server.wait_idle()
        self._check_counts()
        processes = psutil.Process(server.process.pid), server.worker
        front, worker = (process.memory_info().rss / 2**20 for process in processes)
        report.memory.append((front, worker))

    def _check_counts(self) -> None:
        metrics = self.server.metrics()
        names = ("grpc_server_started_total", "grpc_server_handled_total")
        started, handled = (
            sum(
                value
                for (name, labels), value in metrics.items()
                if name == wanted and ("grpc_service", "salver.v1.GenerationService") in labels
            )
            for wanted in names
        )
        if started != handled:
            self.report.lost.append(f"of {started:.0f} calls {handled:.0f} have ended, says the server")


def storm(
    server: Server, *, seed: int, total: int, minutes: float = 0.0, pause_every: int = 250,
    worker_faults: bool = False,
) -> Report:  # fmt: skip
    """Lets it loose on a server that was started with FLAGS."""
    report = asyncio.run(Storm(server, seed, worker_faults=worker_faults).run(total, minutes, pause_every))
    if server.process.poll() is not None:
        report.lost.append("the front")
    if not worker_faults:
        report.lost += [line for line in server.lines if "level=error" in line or "Traceback" in line]
    return report


def main(argv: Sequence[str] | None = None) -> int:
    from support.checkpoints import write_tiny_llama

    parser = argparse.ArgumentParser(prog="python -m faults.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long, whatever --calls says")
    parser.add_argument("--worker-faults", action="store_true", help="kill and stop the worker meanwhile")
    parser.add_argument("--pause-every", type=int, default=250, help="calls between two looks at the books")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_tiny_llama(Path(directory) / "long-llama", context=8192)
        server = Server(str(checkpoint), "--dtype", "float32", "--threads", "1", *FLAGS).wait_serving()
        try:
            report = storm(
                server, seed=arguments.seed, total=arguments.calls, minutes=arguments.minutes,
                pause_every=arguments.pause_every, worker_faults=arguments.worker_faults,
            )  # fmt: skip
            code = server.stop(signal.SIGTERM)
            if code != 0:
                report.lost.append(f"a clean end: the server ended with {code}")
        finally:
            server.kill()
    print(report)
    return 1 if report.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
