"""An engine whose worker is made up and follows a plan (`fake_worker`), and what comes of its requests."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from salver.server.engine.config import EngineConfig
from salver.server.engine.process import EngineProcess, EngineState, EngineTimes
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    StoppingParams,
)

FAKE_WORKER = Path(__file__).parent / "fake_worker.py"
NEVER = 10**9  # tokens


class Sink:
    """Keeps what comes, by sample."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.prompt: list[int] = []
        self.finished: dict[int, FinishReason] = {}
        self.starts = 0
        self.error: Exception | None = None

    def put(self, output):
        assert self.error is None and output.sample_index not in self.finished
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)
        self.prompt += [entry.token_id for entry in output.prompt_logprobs or []]
        if output.finish_reason is not None:
            self.finished[output.sample_index] = output.finish_reason

    def started(self, seconds):
        self.starts += 1

    def fail(self, error):
        assert self.error is None
        self.error = error


def request(request_id: int, max_tokens: int, samples: int = 1, **rest) -> EngineRequest:
    return EngineRequest(
        request_id,
        (request_id, 20, 30),
        SamplingParams(),
        StoppingParams(max_tokens),
        tuple(range(samples)),
        ((),) * samples,
        **rest,
    )


def answer(req: EngineRequest, index: int = 0) -> list[int]:
    first = sum(req.prompt_token_ids) + 1000 * index
    return list(range(first, first + req.stopping.max_tokens))


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        await asyncio.sleep(0.005)


class House:
    """An engine with a fake worker that follows a plan, and the states that it went through."""

    def __init__(self, directory: Path, *plan: dict, **options) -> None:
        self.directory = directory
        (directory / "plan.json").write_text(json.dumps(plan))
        self.states: list[tuple[EngineState, float]] = []
        self.when: dict[EngineState, Callable[[], None]] = {}
        times = options.pop("times", EngineTimes(backoff=0.01))
        self.engine = EngineProcess(
            EngineConfig(checkpoint="none"),
            command=(sys.executable, str(FAKE_WORKER), str(directory)),
            on_state=self.on_state,
            times=times,
            **options,
        )

    def on_state(self, state: EngineState) -> None:
        self.states.append((state, time.monotonic()))
        if state in self.when:
            self.when[state]()

    def submits(self, life: int) -> list[list]:
        return [json.loads(line) for line in (self.directory / f"submits.{life}").read_text().splitlines()]

    async def __aenter__(self) -> House:
        await self.engine.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        pid = self.engine.pid
        await self.engine.stop()
        assert pid is None or not psutil.pid_exists(pid)
        assert self.engine.state is EngineState.STOPPED
        assert self.engine.num_in_flight == 0
