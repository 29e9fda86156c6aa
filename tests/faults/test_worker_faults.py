"""Requests that harm the worker: they end, what is beside them does not notice, the front lives on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from faults.test_worker import NOT_SERVING, SERVING, Watch
from support import calls
from support.calls import explained
from support.serving import Server

from salver.v1 import explanation_pb2, generation_pb2

SERVER = (sys.executable, str(Path(__file__).with_name("faulty_server.py")))
LENGTH = 300
NEIGHBOURS: list[dict[str, Any]] = [
    {"prompt": "greedy", "max_tokens": LENGTH},
    {"prompt": "sampled", "max_tokens": LENGTH, "temperature": 1.0, "seed": 5},
    {"prompt": "two samples", "max_tokens": LENGTH, "temperature": 0.9, "top_p": 0.9, "n": 2, "seed": 6},
    {"prompt": "scored " * 20, "max_tokens": LENGTH, "output_top_k": 2, "prompt_top_k": 1},
]


@pytest.fixture(scope="module")
def served(long_llama: Path, cache_dir: Path) -> Iterator[Server]:
    # Steps of few tokens: the prompts of the neighbours take several.
    flags = ("--max-num-seqs", "16", "--max-num-batched-tokens", "24", "--threads", "1")
    served = Server(
        str(long_llama), "--dtype", "float32", "--cache-dir", str(cache_dir), *flags, command=SERVER
    ).wait_serving()
    try:
        yield served
        assert served.stop() == 0, served.log
        # What a worker said as it ended is in the log, by itself and as its last words; and no other trace.
        assert served.log.count("Traceback") == served.log.count("ZeroDivisionError: as planned") > 0
    finally:
        served.kill()


@pytest.fixture(scope="module")
def expected(served: Server) -> list[Any]:
    requests = [calls.generate_request(ignore_eos=True, **of) for of in NEIGHBOURS]
    return [answer_of([reply]) for reply in served.together(requests)]


def answer_of(messages: list[Any]) -> tuple[Any, ...]:
    """What a reply or a stream says, in one form; log-probabilities by their tokens."""
    whole = calls.Collected(messages)
    of_prompt = [entry.token_id for message in messages for entry in message.prompt_logprobs]
    of_output = [
        (delta.index, entry.token_id, [other.token_id for other in entry.top])
        for message in messages
        for delta in message.completions
        for entry in delta.logprobs
    ]
    return whole.tokens, whole.texts, whole.finish_reasons, of_prompt, sorted(of_output, key=lambda e: e[0])


class Neighbours:
    """Streams under way, each with its first tokens read."""

    def __init__(self, server: Server) -> None:
        self.streams = [server.stream(ignore_eos=True, explain=True, **of) for of in NEIGHBOURS]
        self.messages = [[next(stream)] for stream in self.streams]

    def answers(self) -> list[Any]:
        with ThreadPoolExecutor(len(self.streams)) as pool:
            rest = list(pool.map(list, self.streams))
        self.lasts = [more[-1] for more in rest]
        return [answer_of(first + more) for first, more in zip(self.messages, rest, strict=True)]


def harmful(served: Server, fault: str, position: int) -> calls.Failure:
    """How a request ends that does `fault`."""
    request = calls.stream_request(
        "harm " * 10, max_tokens=LENGTH, ignore_eos=True, cache_salt=f"{fault}:{position}"
    )
    return calls.failure_of(lambda: list(served.generation.StreamGenerate(request, timeout=calls.TIMEOUT)))


def test_a_fault_within_a_step_is_the_culprits_alone(served: Server, expected: list[Any]) -> None:
    """Too little memory, and logits that are not numbers: in the prompt and in the output."""
    watch, worker = Watch(served), served.worker
    neighbours = Neighbours(served)
    with ThreadPoolExecutor() as pool:
        of_memory = [pool.submit(harmful, served, "memory", position) for position in (0, 20)]
        not_numbers = [pool.submit(harmful, served, "nan", position) for position in (0, 20)]
    for future in of_memory:
        failure = future.result()
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.reason == "OUT_OF_MEMORY" and failure.pushback_ms
    for future in not_numbers:
        assert future.result().code is grpc.StatusCode.INTERNAL
    assert neighbours.answers() == expected
    assert (served.worker.pid, served.server_info().worker_restarts) == (worker.pid, 0)
    assert watch.statuses.empty(), "health left SERVING"
    served.wait_idle()


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_request_that_ends_its_worker_twice_ends_and_nobody_else(
    served: Server, expected: list[Any], fault: str
) -> None:
    watch, liveness = Watch(served), Watch(served, "liveness")
    restarts = served.server_info().worker_restarts
    neighbours = Neighbours(served)
    with ThreadPoolExecutor() as pool:
        harm = pool.submit(harmful, served, fault, 20)
        for _ in range(2):
            assert watch.next(10) == NOT_SERVING
            assert watch.next() == SERVING
        failure = harm.result()
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "Traceback" not in failure.message
    assert neighbours.answers() == expected
    for last in neighbours.lasts:  # where their time went, the two restarts too
        assert explained(last)[explanation_pb2.LATENCY_CAUSE_WORKER_RESTART] > 0
    assert served.server_info().worker_restarts == restarts + 2
    assert served.process.poll() is None
    if fault == "die":
        assert liveness.statuses.empty(), "a restart of the worker is no reason to kill the pod"
    else:
        assert liveness.next() == NOT_SERVING


def test_several_of_them_at_once(served: Server, expected: list[Any]) -> None:
    """Of every kind, among them a bug in the step; while others score and generate."""
    score = generation_pb2.ScoreRequest(
        inputs=[
            generation_pb2.ScoreInput(
                context=calls.prompt_of("once upon a time"), continuation=calls.prompt_of(" the end" * i)
            )
            for i in range(1, 5)
        ]
    )
    undisturbed = [result.sum for result in served.generation.Score(score, timeout=calls.TIMEOUT).results]
    restarts = served.server_info().worker_restarts
    neighbours = Neighbours(served)
    with ThreadPoolExecutor() as pool:
        harm = [
            (fault, pool.submit(harmful, served, fault, position))
            for fault, position in [("die", 0), ("raise", 30), ("nan", 3), ("die", 15), ("memory", 9)]
        ]
        for fault, future in harm:
            failure = future.result()
            short_of_memory = fault == "memory"
            assert (failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED) == short_of_memory, failure
            assert (failure.code is grpc.StatusCode.INTERNAL) != short_of_memory, failure
            assert "Traceback" not in failure.message and "ZeroDivision" not in failure.message
    assert neighbours.answers() == expected
    assert restarts + 4 <= served.server_info().worker_restarts <= restarts + 6
    served.wait_health(SERVING, 30)
    again = [result.sum for result in served.generation.Score(score, timeout=calls.TIMEOUT).results]
    assert again == undisturbed
    assert Neighbours(served).answers() == expected
    served.wait_idle()
