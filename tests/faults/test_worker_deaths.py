"""A worker that dies: what becomes of its requests, and which of them is blamed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from faults.engine_house import NEVER, House, Sink, answer, request, until

from salver.server.engine.errors import EngineUnavailable, RequestFailed
from salver.server.engine.process import EngineState
from salver.server.engine.request import BeamParams


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
