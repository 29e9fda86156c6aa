"""The front's hold on its worker: outputs, stalls, failing starts, no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from faults.engine_house import FAKE_WORKER, NEVER, House, Sink, answer, request, until

from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import EngineStartError, EngineUnavailable, RequestFailed
from salver.server.engine.process import EngineProcess, EngineState, EngineTimes


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
