"""The front's hold on its worker: death, resubmission, stalls, failing starts, no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import EngineStartError, EngineUnavailable, RequestFailed
from salver.server.engine.process import EngineProcess, EngineState, EngineTimes
from salver.server.engine.request import (
    BeamParams,
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


def test_outputs_reach_their_requests(tmp_path):
    async def main():
        steps = []
        async with House(tmp_path, {}, on_step=steps.append) as house:
            assert house.engine.ready.numerics_id == "fake"
            requests = [request(i, 3 + i, samples=1 + i % 2) for i in range(1, 6)]
            sinks = [Sink() for _ in requests]
            for req, sink in zip(requests, sinks, strict=True):
                house.engine.submit(req, sink)
            await until(lambda: house.engine.num_in_flight == 0)
            for req, sink in zip(requests, sinks, strict=True):
                assert sink.tokens == {index: answer(req, index) for index in req.sample_indices}
                assert sink.starts == 1
            assert sum(len(step.outputs) for step in steps) == sum(
                len(tokens) for sink in sinks for tokens in sink.tokens.values()
            )
            # Out of reach of a terminal's Ctrl-C.
            assert os.getsid(house.engine.pid) != os.getsid(0)

    asyncio.run(main())


def test_an_abort_ends_the_outputs_at_once_and_reaches_the_worker(tmp_path):
    async def main():
        async with House(tmp_path, {}) as house:
            one, two = Sink(), Sink()
            house.engine.submit(request(1, NEVER), one)
            house.engine.submit(request(2, NEVER, samples=2), two)
            await until(lambda: one.tokens and len(two.tokens) == 2)
            house.engine.abort(1)
            house.engine.abort(2, 1)
            house.engine.abort(99)
            lengths = len(one.tokens[0]), len(two.tokens[0]), len(two.tokens[1])
            await until(lambda: len(two.tokens[0]) > lengths[1] + 20)
            assert (len(one.tokens[0]), len(two.tokens[1])) == (lengths[0], lengths[2])
            house.engine.abort(2, 0)
            await until(lambda: ["abort", 2, 0] in house.submits(0))
            assert house.submits(0)[2:] == [["abort", 1, None], ["abort", 2, 1], ["abort", 2, 0]]
            assert house.engine.num_in_flight == 0

    asyncio.run(main())


def test_requests_go_on_in_the_next_worker_from_their_tokens_so_far(tmp_path):
    """No token lost or repeated; finished samples and told log-probabilities are not asked for again."""

    async def main():
        async with House(tmp_path, {"after_submits": 3, "die_after_steps": 5}, {}) as house:
            long, short = request(1, 30, samples=2), request(2, 2)
            scored = replace(request(3, 4, prompt_top_k=0), prompt_token_ids=tuple(range(50, 60)))
            sinks = {req.request_id: Sink() for req in (long, short, scored)}
            for req in (long, short, scored):
                house.engine.submit(req, sinks[req.request_id])
            unavailable = []

            def refused():
                try:
                    house.engine.submit(request(9, 1), Sink())
                except EngineUnavailable as error:
                    unavailable.append(error)

            house.when[EngineState.RESTARTING] = refused
            await until(lambda: house.engine.num_in_flight == 0)
            assert sinks[1].tokens == {0: answer(long, 0), 1: answer(long, 1)}
            assert sinks[2].tokens == {0: answer(short)}
            assert sinks[3].tokens == {0: answer(scored)}
            assert sinks[3].prompt == list(range(51, 60))
            assert [sink.starts for sink in sinks.values()] == [1, 1, 1]
            assert house.engine.restarts == 1
            assert unavailable[0].retry_after > 0
            again = {line[0]: line[1:] for line in house.submits(1)}
            assert set(again) == {1, 3}
            samples, outputs, _, _ = again[1]
            assert samples == [0, 1]
            for index, output in zip(samples, outputs, strict=True):
                assert len(output) >= 5
                assert output == answer(long, index)[: len(output)]
            assert again[3] == [[0], [[]], 0, 6]  # positions 1 to 5 were told
            assert house.engine.page.steps >= 5 + 25  # over both lives
            states = [state for state, _ in house.states]
            assert states == [EngineState.SERVING, EngineState.RESTARTING, EngineState.SERVING]

    asyncio.run(main())


def test_told_prompt_log_probabilities_are_dropped_from_the_resubmission(tmp_path):
    async def main():
        async with House(tmp_path, {"die_after_steps": 4}, {}) as house:
            req, sink = request(1, 8, prompt_top_k=3), Sink()
            house.engine.submit(req, sink)
            await until(lambda: house.engine.num_in_flight == 0)
            assert sink.tokens == {0: answer(req)}
            assert sink.prompt == [20, 30]
            assert house.submits(1) == [[1, [0], [answer(req)[:2]], None, 3]]

    asyncio.run(main())


def test_a_request_alone_whose_worker_died_twice_fails(tmp_path):
    async def main():
        async with House(tmp_path, {"die_after_steps": 3}, {"die_after_steps": 3}, {}) as house:
            first, second = Sink(), Sink()
            house.engine.submit(request(1, NEVER), first)
            await until(lambda: first.error)
            assert isinstance(first.error, RequestFailed)
            await until(lambda: house.engine.restarts == 2)
            late = request(2, 20_000)
            house.engine.submit(late, second)
            await until(lambda: second.finished)
            assert second.tokens == {0: answer(late)}

    asyncio.run(main())


def test_nobody_is_blamed_for_deaths_that_come_now_and_then_until_they_are_too_many(tmp_path):
    async def main():
        dying = {"after_submits": 2, "die_after_steps": 3}
        async with House(tmp_path, dying, dying, dying, {}) as house:
            requests, sinks = (request(1, 30_000), request(2, 30_000)), (Sink(), Sink())
            for req, sink in zip(requests, sinks, strict=True):
                house.engine.submit(req, sink)
            await until(lambda: house.engine.num_in_flight == 0)
            assert [sink.tokens for sink in sinks] == [{0: answer(req)} for req in requests]
            assert house.engine.restarts == 3

    async def too_many():
        dying = {"after_submits": 2, "die_after_steps": 3}
        (tmp_path / "more").mkdir()
        async with House(tmp_path / "more", dying) as house:
            sinks = Sink(), Sink()
            for number, sink in enumerate(sinks):
                house.engine.submit(request(number, NEVER), sink)
            await until(lambda: house.engine.restarts == 4)
            assert [type(sink.error) for sink in sinks] == [RequestFailed, RequestFailed]

    asyncio.run(main())
    asyncio.run(too_many())


@pytest.mark.parametrize("at", [0, 5])
def test_requests_that_kill_workers_end_alone(tmp_path, at):
    """Each kills two, and their neighbours lose nothing, however many die under them."""

    async def main():
        async with House(tmp_path, {"killers": [3, 5], "at": at}) as house:
            requests = [request(i, 40_000, samples=1 + i % 2) for i in range(1, 8)]
            sinks = [Sink() for _ in requests]
            for req, sink in zip(requests, sinks, strict=True):
                house.engine.submit(req, sink)
            killers = sinks[2], sinks[4]
            await until(lambda: all(sink.error for sink in killers) and house.engine.restarts == 3)
            late = Sink()
            house.engine.submit(request(8, 3), late)
            await until(lambda: house.engine.num_in_flight == 0)
            for req, sink in zip(requests, sinks, strict=True):
                if sink in killers:
                    assert isinstance(sink.error, RequestFailed)
                else:
                    assert sink.tokens == {index: answer(req, index) for index in req.sample_indices}
                assert sink.starts == 1
            assert late.tokens == {0: answer(request(8, 3))}
            assert house.engine.restarts == 3
            assert house.engine.state is EngineState.SERVING
            # Of the last lives each had seen one killer, which came alone and was the last that came.
            assert [line[0] for line in house.submits(1)] == [1, 2, 3]
            assert [line[0] for line in house.submits(2)] == [1, 2, 4, 5]

    asyncio.run(main())


def test_what_comes_while_a_suspect_is_tried_waits_for_the_verdict(tmp_path):
    async def main():
        async with House(tmp_path, {"killers": [1], "at": 0}) as house:
            killer, late, gone = Sink(), Sink(), Sink()
            house.engine.submit(request(1, NEVER), killer)
            await until(lambda: house.engine.state is EngineState.RESTARTING)

            def come():
                house.engine.submit(request(2, 20), late)
                house.engine.submit(request(3, 20), gone)
                house.engine.abort(3)
                house.when.clear()

            house.when[EngineState.SERVING] = come
            await until(lambda: killer.error)
            await until(lambda: late.finished)
            assert late.tokens == {0: answer(request(2, 20))} and not gone.tokens
            assert [line[0] for line in house.submits(1)] == [1, "abort"]
            assert [line[0] for line in house.submits(2)] == [2]

    asyncio.run(main())


def test_a_suspect_that_is_aborted_lets_the_others_go_on(tmp_path):
    async def main():
        async with House(tmp_path, {"after_submits": 2, "die_after_steps": 3}, {}) as house:
            first, second = Sink(), Sink()
            house.engine.submit(request(1, NEVER, samples=2), first)
            house.engine.submit(request(2, 20_000), second)
            await until(lambda: house.engine.state is EngineState.RESTARTING)
            house.when[EngineState.SERVING] = lambda: house.engine.abort(1)
            await until(lambda: second.finished)
            assert second.tokens == {0: answer(request(2, 20_000))}

    asyncio.run(main())


def test_a_beam_search_is_no_suspect_once_it_goes_well(tmp_path):
    """It has no tokens until it ends; it begins anew in the next worker."""

    async def main():
        async with House(tmp_path, {"after_submits": 2, "die_after_steps": 3}, {}) as house:
            search, other = Sink(), Sink()
            house.engine.submit(request(1, NEVER, samples=2, beams=BeamParams(3)), search)
            house.engine.submit(request(2, 20_000), other)
            await until(lambda: other.finished)
            assert other.tokens == {0: answer(request(2, 20_000))}
            assert house.submits(1)[0][:3] == [1, [0, 1], [[], []]]
            assert not search.finished and not any(search.tokens.values())
            house.engine.abort(1)

    asyncio.run(main())


def test_a_request_aborted_while_restarting_is_not_submitted_again(tmp_path):
    async def main():
        async with House(tmp_path, {"die_after_steps": 3}, {}) as house:
            sink = Sink()
            house.engine.submit(request(1, NEVER), sink)
            house.when[EngineState.RESTARTING] = lambda: house.engine.abort(1)
            await until(lambda: house.engine.restarts == 1)
            other = Sink()
            house.engine.submit(request(2, 1), other)
            await until(lambda: other.finished)
            assert [line[0] for line in house.submits(1)] == [2]

    asyncio.run(main())


def test_an_idle_worker_that_is_killed_comes_back(tmp_path):
    async def main():
        async with House(tmp_path, {}) as house:
            pid = house.engine.pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: house.engine.restarts == 1)
            assert house.engine.pid != pid
            sink = Sink()
            house.engine.submit(request(1, 3), sink)
            await until(lambda: sink.finished)

    asyncio.run(main())


def test_a_stopped_worker_is_stalled_within_two_seconds_and_comes_back(tmp_path):
    async def main():
        async with House(tmp_path, {}) as house:
            sink = Sink()
            house.engine.submit(request(1, NEVER), sink)
            await until(lambda: sink.tokens)
            stopped = time.monotonic()
            os.kill(house.engine.pid, signal.SIGSTOP)
            await until(lambda: house.engine.state is EngineState.STALLED)
            assert 1.2 < house.states[-1][1] - stopped < 2.0
            late = Sink()
            house.engine.submit(request(2, 5), late)  # still alive: taken
            continued = time.monotonic()
            os.kill(house.engine.pid, signal.SIGCONT)
            await until(lambda: house.engine.state is EngineState.SERVING)
            assert house.states[-1][1] - continued < 1.0
            await until(lambda: late.finished)
            assert house.engine.restarts == 0

    asyncio.run(main())


def test_a_worker_that_stays_stalled_is_replaced(tmp_path):
    async def main():
        times = EngineTimes(tick=0.05, stalled_after=0.3, kill_after=0.2, backoff=0.01)
        async with House(tmp_path, {}, times=times) as house:
            sink = Sink()
            req = request(1, 50_000)
            house.engine.submit(req, sink)
            await until(lambda: sink.tokens)
            os.kill(house.engine.pid, signal.SIGSTOP)
            await until(lambda: house.engine.restarts == 1)
            await until(lambda: sink.finished)
            assert sink.tokens == {0: answer(req)}
            states = [state for state, _ in house.states]
            assert states[1:3] == [EngineState.STALLED, EngineState.RESTARTING]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"fail": "--dtype: float17 is not a type"}, ["--dtype: float17 is not a type"]),
        ({"exit": 3, "say": "no such device"}, ["exit code 3", "no such device"]),
    ],
)
def test_a_failing_start_says_why_and_leaves_nothing(tmp_path, plan, words, capfd):
    async def main():
        house = House(tmp_path, plan)
        children = set(psutil.Process().children())
        with pytest.raises(EngineStartError) as raised:
            await house.engine.start()
        assert all(word in str(raised.value) for word in words)
        assert house.engine.state is EngineState.FAILED
        assert set(psutil.Process().children()) <= children
        with pytest.raises(EngineUnavailable):
            house.engine.submit(request(1, 1), Sink())
        await house.engine.stop()

    asyncio.run(main())
    if "say" in plan:
        assert plan["say"] in capfd.readouterr().err


def test_a_command_that_cannot_run_is_a_start_error(tmp_path):
    async def main():
        engine = EngineProcess(EngineConfig(checkpoint="none"), command=[str(tmp_path / "nothing")])
        with pytest.raises(EngineStartError, match="nothing"):
            await engine.start()

    asyncio.run(main())


def test_workers_that_never_serve_again_end_in_failed(tmp_path):
    async def main():
        async with House(tmp_path, {"die_after_steps": 2}, {"exit": 4}, max_failures=3) as house:
            sink = Sink()
            house.engine.submit(request(1, NEVER), sink)
            await until(lambda: house.engine.state is EngineState.FAILED)
            assert isinstance(sink.error, EngineUnavailable)
            assert len(list(tmp_path.glob("submits.*"))) == 1 + 3
            with pytest.raises(EngineUnavailable):
                house.engine.submit(request(2, 1), Sink())

    asyncio.run(main())


def test_stop_tells_those_in_flight_and_kills_a_worker_that_does_not_listen(tmp_path):
    async def main():
        times = EngineTimes(stop_grace=0.2)
        async with House(tmp_path, {}, times=times) as house:
            sink = Sink()
            house.engine.submit(request(1, NEVER), sink)
            await until(lambda: sink.tokens)
            os.kill(house.engine.pid, signal.SIGSTOP)
        assert isinstance(sink.error, EngineUnavailable)

    asyncio.run(main())


def test_stop_while_restarting_leaves_no_process(tmp_path):
    async def main():
        children = set(psutil.Process().children())
        async with House(tmp_path, {"die_after_steps": 1}, {}) as house:
            house.engine.submit(request(1, NEVER), Sink())
            await until(lambda: house.engine.state is EngineState.RESTARTING)
        assert set(psutil.Process().children()) <= children

    asyncio.run(main())


def test_stop_while_starting_leaves_no_process(tmp_path):
    async def main():
        house = House(tmp_path, {"hang": True})
        children = set(psutil.Process().children())
        start = asyncio.create_task(house.engine.start())
        await until(lambda: list(tmp_path.glob("submits.*")))
        await house.engine.stop()
        with pytest.raises(EngineStartError, match="stopped"):
            await start
        assert set(psutil.Process().children()) <= children
        assert house.engine.state is EngineState.STOPPED

    asyncio.run(main())


def test_a_worker_that_loads_for_too_long_is_a_start_error(tmp_path):
    async def main():
        house = House(tmp_path, {"hang": True}, times=EngineTimes(start_timeout=0.3))
        children = set(psutil.Process().children())
        with pytest.raises(EngineStartError, match="not ready after"):
            await house.engine.start()
        assert set(psutil.Process().children()) <= children

    asyncio.run(main())


def test_a_sink_that_raises_fails_alone(tmp_path):
    class Broken(Sink):
        def put(self, output):
            raise ZeroDivisionError

    async def main():
        async with House(tmp_path, {}) as house:
            broken, sound = Broken(), Sink()
            house.engine.submit(request(1, NEVER), broken)
            req = request(2, 10)
            house.engine.submit(req, sound)
            await until(lambda: sound.finished)
            assert sound.tokens == {0: answer(req)}
            assert isinstance(broken.error, RequestFailed)

    asyncio.run(main())


FRONT = """
import asyncio, sys
from salver.server.engine.config import EngineConfig
from salver.server.engine.process import EngineProcess
async def main():
    engine = EngineProcess(EngineConfig(checkpoint="none"), command=sys.argv[1:])
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_worker_ends_with_a_front_that_was_killed(tmp_path):
    (tmp_path / "plan.json").write_text("[{}]")
    command = [sys.executable, "-c", FRONT, sys.executable, str(FAKE_WORKER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
        worker = psutil.Process(int(front.stdout.readline()))
        front.kill()

    def gone() -> bool:
        try:
            return worker.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    asyncio.run(until(gone))
