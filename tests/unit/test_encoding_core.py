"""Requests that ask for arrays, in the engine: whole inputs, and prompts that are pooled in chunks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from salver.model.pooling import MODES, Pool
from salver.server.engine.core import EngineLimits, RowResult, StepResult
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    EncodingParams,
    EngineRequest,
    FinishReason,
    Readout,
    SamplingParams,
    SequenceOutput,
    StoppingParams,
)
from salver.server.engine.schedule import Schedule
from salver.server.rpc.convert import add_floats
from salver.v1 import encoding_pb2

LIMITS = EngineLimits(
    num_blocks=33,
    block_size=4,
    max_model_len=200,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    check_integrity=True,
)


class Runner:
    """Samples the sum of all tokens so far; reads of a part its tokens, and of a whole one its length."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int, bool]]] = []  # tokens, start, whole
        self.memory = 10_000

    def execute(self, schedule: Schedule) -> StepResult:
        if schedule.num_tokens > self.memory:
            raise OutOfMemory("too much")
        self.steps.append([(i.num_tokens, i.start, i.sequence.whole) for i in schedule.scheduled])
        rows = []
        for item in schedule.scheduled:
            sequence, row = item.sequence, RowResult()
            if sequence.request.encoding is not None:
                assert sequence.whole or len(sequence.block_table) * 4 >= item.start + item.num_tokens
                read = (*(sequence.partial or ()), *item.token_ids)  # type: ignore[misc]
                row.partial = read
                if item.start + item.num_tokens == sequence.num_tokens:
                    row.arrays = (np.array(read),)
            elif item.samples:
                row.token_ids = [sum(sequence.token_ids) % 97]
            rows.append(row)
        return StepResult(rows)


class Sink:
    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []

    def put(self, output: SequenceOutput) -> None:
        self.outputs.append(output)

    def started(self, seconds: float) -> None:
        pass

    @property
    def last(self) -> SequenceOutput:
        return self.outputs[-1]


def request(
    number: int, length: int, *, whole: bool = True, max_tokens: int = 0, **fields: object
) -> EngineRequest:
    encoding = EncodingParams(Readout.TOKENS, whole=whole) if max_tokens == 0 else None
    return EngineRequest(
        number, tuple(range(number, number + length)), SamplingParams(temperature=0.0),
        StoppingParams(max_tokens), encoding=encoding, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def engine(runner: Runner, limits: EngineLimits = LIMITS) -> InlineEngine:
    return InlineEngine(runner, limits, clock=lambda: 0.0)


def run(requests: list[EngineRequest], runner: Runner | None = None) -> list[Sink]:
    inline = engine(runner or Runner())
    sinks = [Sink() for _ in requests]
    for item, sink in zip(requests, sinks, strict=True):
        inline.submit(item, sink)
    inline.run()
    assert inline.core.pool.num_used == 0
    return sinks


def test_whole_inputs_are_never_cut_and_take_no_blocks() -> None:
    runner = Runner()
    lengths = [20, 10, 5, 150, 3, 30, 2]
    sinks = run([request(i, n) for i, n in enumerate(lengths)], runner)
    assert runner.steps == [
        [(20, 0, True), (10, 0, True)],  # 5 more do not fit
        [(5, 0, True)],
        [(150, 0, True)],  # longer than any step: alone
        [(3, 0, True)],
        [(30, 0, True), (2, 0, True)],
    ]
    for number, (sink, length) in enumerate(zip(sinks, lengths, strict=True)):
        assert sink.last.arrays[0].tolist() == list(range(number, number + length))
        assert sink.last.finish_reason is FinishReason.LENGTH and sink.last.token_ids == []


def test_whole_inputs_share_steps_with_streams_and_change_none_of_their_tokens() -> None:
    streams = [request(100 + i, 6 + i, max_tokens=12) for i in range(3)]
    alone = [[t for o in run([r])[0].outputs for t in o.token_ids] for r in streams]
    runner = Runner()
    mixed = [streams[0], request(1, 40), streams[1], request(2, 7, whole=False), streams[2], request(3, 9)]
    sinks = run(mixed, runner)
    assert [[t for o in sinks[i].outputs for t in o.token_ids] for i in (0, 2, 4)] == alone
    assert [sinks[i].last.arrays[0].tolist() for i in (1, 3, 5)] == [
        list(mixed[i].prompt_token_ids) for i in (1, 3, 5)
    ]
    assert any(len({whole for _, _, whole in step}) == 2 for step in runner.steps)


def test_a_pooled_prompt_is_read_in_chunks_and_skips_no_cached_position() -> None:
    runner = Runner()
    inline = engine(runner)
    for number in (1, 1):  # the second finds all its blocks in the prefix cache
        sink = Sink()
        inline.submit(request(number, 70, whole=False), sink)
        inline.run()
        assert sink.last.arrays[0].tolist() == list(range(1, 71)) and sink.last.num_cached_tokens == 0
    assert [[(n, start) for n, start, _ in step] for step in runner.steps] == 2 * [
        [(32, 0)],
        [(32, 32)],
        [(6, 64)],
    ]


def test_a_preempted_prompt_forgets_what_was_read() -> None:
    limits = EngineLimits(
        num_blocks=21, block_size=4, max_model_len=80, max_num_seqs=4, max_num_batched_tokens=6,
        check_integrity=True, enable_prefix_caching=False,
    )  # fmt: skip
    inline = engine(Runner(), limits)
    stream, sink = Sink(), Sink()
    inline.submit(request(1, 8, max_tokens=40), stream)
    inline.step()
    inline.submit(request(2, 64, whole=False, priority=-10), sink)
    inline.run()
    assert sink.last.arrays[0].tolist() == list(range(2, 66))
    assert sink.last.timings is not None and sink.last.timings.preemptions > 0


def test_deadlines_and_aborts_end_whole_inputs_too() -> None:
    now = [0.0]
    inline = InlineEngine(Runner(), LIMITS, clock=lambda: now[0])
    late, gone, kept = Sink(), Sink(), Sink()
    inline.submit(request(1, 5, deadline=1.0), late)
    inline.submit(request(2, 5), gone)
    inline.submit(request(3, 5), kept)
    inline.abort(2)
    now[0] = 2.0
    inline.run()
    assert late.last.finish_reason is FinishReason.DEADLINE and late.last.arrays == ()
    assert gone.outputs == [] and len(kept.last.arrays) == 1


def test_an_input_that_does_not_fit_the_memory_fails_alone() -> None:
    runner = Runner()
    runner.memory = 20
    small, large = request(1, 9), request(2, 22)
    sinks = run([small, large, request(3, 9)], runner)
    assert sinks[1].last.finish_reason is FinishReason.MEMORY
    assert [len(sinks[i].last.arrays) for i in (0, 2)] == [1, 1]


def test_an_input_longer_than_the_context_is_refused() -> None:
    (sink,) = run([request(1, 201)])
    assert sink.last.finish_reason is FinishReason.ERROR and "201" in sink.last.error


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_has_the_same_bits_however_it_is_cut(mode: str) -> None:
    draw = random.Random(0)
    hidden = np.random.default_rng(0).standard_normal((57, 24)).astype(np.float32) * 10
    whole = Pool((mode,)).add(hidden).vector()
    for _ in range(20):
        cuts = sorted(draw.sample(range(1, 57), draw.randrange(1, 9)))
        pool = Pool((mode,))
        for first, end in zip([0, *cuts], [*cuts, 57], strict=True):
            before, pool = pool, pool.add(hidden[first:end])
            assert before.add(hidden[first:end]).num_tokens == pool.num_tokens  # the old one is as it was
        assert (pool.vector() == whole).all()
    wide = hidden.astype(np.float64)
    weights = np.arange(1, 58)[:, None]
    expected = {
        "cls": wide[0], "lasttoken": wide[-1], "max": wide.max(0), "mean": wide.mean(0),
        "mean_sqrt_len_tokens": wide.sum(0) / 57**0.5,
        "weightedmean": (wide * weights).sum(0) / weights.sum(),
    }  # fmt: skip
    np.testing.assert_allclose(whole, expected[mode], rtol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 5000])
def test_vectors_become_the_bytes_of_the_wire(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    made = encoding_pb2.Embedding(num_tokens=3)
    add_floats(made, "values", values)
    assert made == encoding_pb2.Embedding(num_tokens=3, values=values.tolist())
    token = encoding_pb2.TokenEmbedding()
    add_floats(token, "values", values[::2])  # a number of its own, and numbers that don't stand in a row
    assert list(token.values) == values[::2].tolist()
