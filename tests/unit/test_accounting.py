"""The books of the engine: every moment of a request has one cause, and steps are paid by who was in them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bookkeeping import BLOCK, BookkeepingRunner, request
from unit.test_overlap import FakeDevice, VirtualClock

from salver.server.engine.accounting import Account, Cause, divide
from salver.server.engine.core import EngineLimits
from salver.server.engine.explanation import RequestBooks
from salver.server.engine.inline import InlineEngine
from salver.server.engine.overlap import OverlappedCore
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    SequenceOutput,
    StepMessage,
)
from salver.server.engine.schedule import Schedule
from salver.server.rpc import convert
from salver.v1 import explanation_pb2

LIMITS = EngineLimits(
    num_blocks=200, block_size=BLOCK, max_model_len=200, max_num_seqs=4, max_num_batched_tokens=64,
    check_integrity=True,
)  # fmt: skip
BASE, SEQUENCE, TOKEN = 0.016, 0.002, 0.001  # seconds of a step, of each sequence in it, of further tokens


class Sink:
    def __init__(self) -> None:
        self.accounts: dict[int, Account] = {}
        self.ended: set[int] = set()

    def started(self, seconds: float) -> None:
        pass

    def put(self, output: SequenceOutput) -> None:
        if output.account is not None:
            self.accounts[output.sample_index] = output.account
        if output.finish_reason is not None:
            self.ended.add(output.sample_index)


class Engine:
    """Under a virtual clock that a step moves on by what it computes, and `pause` between steps."""

    def __init__(self, pause: float = 0.0, **limits: object) -> None:
        self.now, self.pause = 100.0, pause
        self.runner = BookkeepingRunner()
        self.engine = InlineEngine(self, replace(LIMITS, **limits), clock=lambda: self.now)  # type: ignore[arg-type]
        self.messages: list[StepMessage] = []

    def execute(self, schedule: Schedule):  # type: ignore[no-untyped-def]
        num_sequences = len(schedule.scheduled)
        self.now += BASE + SEQUENCE * num_sequences + TOKEN * (schedule.num_tokens - num_sequences)
        return self.runner.execute(schedule)

    def submit(self, item: EngineRequest) -> Sink:
        sink = Sink()
        self.engine.submit(replace(item, arrival=self.now, submitted=self.now, explain=True), sink)
        return sink

    def step(self) -> StepMessage | None:
        message = self.engine.step()
        if message is not None:
            self.messages.append(message)
        self.now += self.pause
        return message

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def warm(self) -> None:
        """Steps of several kinds, from which the costs are learned."""
        for number in range(1000, 1012):
            self.submit(request(number, [number % 50] * (1 + number % 7 * 5), 6, cache_salt=str(number)))
        self.run()


@given(st.integers(0, 10**12), st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_shares_sum_to_what_was_divided(amount: int, weights: list[int]) -> None:
    shares = divide(amount, weights)
    assert sum(shares) == amount
    total = sum(weights)
    assert all(abs(s * total - amount * w) <= total for s, w in zip(shares, weights, strict=True))


def test_bills_sum_to_the_busy_time_and_causes_to_the_wall_time() -> None:
    """Of crowds with several tenants, samples and beams, chunks, shared prefixes and preemptions."""
    seen: set[Cause] = set()
    for seed in range(6):
        seen |= crowd(random.Random(seed))
    assert {Cause.NO_SEAT, Cause.NO_BLOCKS, Cause.RECOMPUTATION, Cause.BETWEEN_STEPS} <= seen
    assert {Cause.PREFILL, Cause.DECODE, Cause.INTERFERENCE, Cause.OTHER_TENANT} <= seen


def crowd(rng: random.Random) -> set[Cause]:
    """The causes that took time; checks the sums."""
    engine = Engine(pause=0.25, num_blocks=26, max_num_batched_tokens=9, max_model_len=96)
    sinks: list[tuple[EngineRequest, Sink]] = []
    for number in range(30):
        item = request(
            number, [rng.randrange(2) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 20),
            rng.choice([1, 1, 3]), tenant=rng.choice("ab"),
        )  # fmt: skip
        if number % 7 == 6:
            item = request(number, [1] * rng.randrange(1, 9), 6, 2, tenant="a", beams=BeamParams(3))
        sinks.append((item, engine.submit(item)))
        for _ in range(rng.randrange(3)):
            engine.step()
    engine.run()
    accounts = [account for _, sink in sinks for account in sink.accounts.values()]
    busy = [(m.stats, round(m.stats.duration * 1e9)) for m in engine.messages if m.stats is not None]
    assert sum(account.device_ns for account in accounts) == sum(nanoseconds for _, nanoseconds in busy)
    assert all(sum(share for _, share in stats.tenants) == nanoseconds for stats, nanoseconds in busy)
    for item, sink in sinks:
        assert sink.ended == set(item.sample_indices)
        assert sink.accounts.keys() == (sink.ended if item.beams is None else {0})
    for account in accounts:
        assert sum(account.seconds.values()) == pytest.approx(account.mark - account.submitted, abs=1e-9)
        assert min(account.seconds.values()) > -1e-9
    return {cause for account in accounts for cause, seconds in account.seconds.items() if seconds > 1e-6}


@pytest.mark.parametrize("full_at", [0, 4])
def test_steps_that_overlap(full_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is planned while one is computed: still every moment has one cause, and one payer."""
    rng, clock = random.Random(full_at), VirtualClock()
    limits = replace(LIMITS, num_blocks=16, max_num_batched_tokens=9, max_model_len=96)
    core = OverlappedCore(FakeDevice(clock, full_at), limits, clock=clock)
    outputs: dict[int, SequenceOutput] = {}
    durations: list[float] = []
    charge, spend = core._accounting.charge, Account.spend

    def counted(scheduled: Any, seconds: float) -> Any:
        durations.append(seconds)
        return charge(scheduled, seconds)

    def forwards(account: Account, cause: Cause, now: float) -> None:
        assert now > account.mark - 1e-9, f"{cause} back from {account.mark} to {now}"
        spend(account, cause, now)

    monkeypatch.setattr(core._accounting, "charge", counted)
    monkeypatch.setattr(Account, "spend", forwards)
    for number in range(600):
        if number < 20:
            item = request(
                number, [rng.randrange(2) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 20)
            )
            core.add(replace(item, arrival=clock.now, submitted=clock.now, explain=True))
        message = core.step()
        if message is not None:
            outputs |= {output.request_id: output for output in message.outputs}
    assert not core.has_work and core.num_overlapped > 20 and core.scheduler.preemptions
    accounts = [output.account for output in outputs.values() if output.account is not None]
    busy = sum(round(seconds * 1e9) for seconds in durations)
    assert len(accounts) == 20 and sum(account.device_ns for account in accounts) == busy
    for account in accounts:
        assert sum(account.seconds.values()) == pytest.approx(account.mark - account.submitted, abs=1e-9)
        assert min(account.seconds.values()) > -1e-9


def spent(sink: Sink) -> dict[Cause, float]:
    """Of the only sample, without what took no time."""
    (account,) = sink.accounts.values()
    return {cause: seconds for cause, seconds in account.seconds.items() if abs(seconds) > 1e-9}


def test_who_is_alone_waits_for_nobody() -> None:
    engine = Engine()
    engine.warm()
    begin = engine.now
    sink = engine.submit(request(1, [7] * 20, 5))
    engine.run()
    assert spent(sink) == pytest.approx({
        Cause.PREFILL: BASE + SEQUENCE + 19 * TOKEN, Cause.DECODE: 4 * (BASE + SEQUENCE),
    })  # fmt: skip
    assert sink.accounts[0].device_ns == pytest.approx((engine.now - begin) * 1e9, abs=5)


def test_no_seat() -> None:
    engine = Engine(max_num_seqs=1)
    long, begin = engine.submit(request(1, [7] * 4, 10)), engine.now
    engine.step()
    came = engine.now
    short = engine.submit(request(2, [9] * 4, 1))
    while long.ended != {0}:
        engine.step()
    freed = engine.now
    engine.run()
    assert begin < came < freed
    waited = spent(short)
    assert waited.pop(Cause.PREFILL) > 0
    # Until the next look at the queue nobody knows why: it is the step in progress.
    assert waited == pytest.approx({Cause.NO_SEAT: freed - came})


def test_no_blocks() -> None:
    engine = Engine(num_blocks=12, max_model_len=40)
    engine.submit(request(1, [7] * 30, 10))
    engine.step()
    waiting = engine.submit(request(2, [9] * 16, 2))
    engine.run()
    assert max(spent(waiting), key=spent(waiting).__getitem__) is Cause.NO_BLOCKS


def test_full_steps() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.submit(request(1, [7] * 60, 1))
    engine.step()
    waiting = engine.submit(request(2, [9] * 4, 1))
    engine.run()
    assert max(spent(waiting), key=spent(waiting).__getitem__) is Cause.NO_TOKENS


def test_another_tenants_turn() -> None:
    """Who has had much waits for who comes later and has had little; that one waits for a seat."""
    engine = Engine(max_num_seqs=1)
    engine.submit(request(1, [7] * 60, 30, tenant="greedy"))
    engine.step()
    second = engine.submit(request(2, [8] * 4, 1, tenant="greedy"))
    engine.step()
    modest = engine.submit(request(3, [9] * 4, 1, tenant="modest"))
    engine.run()
    assert Cause.OTHER_TENANT in spent(second) and Cause.OTHER_TENANT not in spent(modest)
    assert spent(second)[Cause.NO_SEAT] > 0 and spent(modest)[Cause.NO_SEAT] > 0


def test_interference_is_what_a_step_takes_beyond_its_own() -> None:
    engine = Engine()
    engine.warm()
    stream = engine.submit(request(1, [7], 3))
    engine.step()
    before = spent(stream)
    prompt = engine.submit(request(2, [9] * 40, 1))
    engine.step()  # both
    own = spent(stream)[Cause.DECODE]
    assert own == pytest.approx(BASE + SEQUENCE, rel=0.1)
    assert Cause.INTERFERENCE not in before
    assert spent(stream)[Cause.INTERFERENCE] == pytest.approx(SEQUENCE + 39 * TOKEN, rel=0.1)
    # The bill: by the costs of the tokens, what the step costs anyhow along with them.
    step = (BASE + 2 * SEQUENCE + 39 * TOKEN) * 1e9
    of_prompt = prompt.accounts[0].device_ns
    assert of_prompt == pytest.approx(step * (SEQUENCE + 39 * TOKEN) / (2 * SEQUENCE + 39 * TOKEN), rel=0.1)


def test_samples_share_the_time_of_their_prompt_and_pay_it_once() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.warm()
    begin = engine.now
    sink = engine.submit(request(1, [7] * 60, 2, n=3))
    engine.run()
    prefill = [account.seconds[Cause.PREFILL] for account in sink.accounts.values()]
    assert min(prefill) > 3 * BASE
    bills = sorted(account.device_ns for account in sink.accounts.values())
    assert bills[2] > 3 * bills[1]
    assert sum(bills) == pytest.approx((engine.now - begin) * 1e9, abs=20)


def test_nobody_asked() -> None:
    engine = Engine()
    sink: list[SequenceOutput] = []

    class Plain(Sink):
        def put(self, output: SequenceOutput) -> None:
            sink.append(output)

    engine.engine.submit(request(1, [7] * 4, 3), Plain())
    engine.run()
    assert sink and all(output.account is None for output in sink)
    assert engine.messages[0].stats is not None and engine.messages[0].stats.tenants


# ---- what the front adds ----


def output(account: Account, sample: int = 0) -> SequenceOutput:
    return SequenceOutput(1, sample, [5], account=account)


def parts(books: RequestBooks, now: float) -> dict[Cause, float]:
    found = {cause: seconds for cause, seconds in books.explain(now).seconds.items() if seconds}
    assert sum(found.values()) == pytest.approx(now - 100.0)
    return found


def test_from_arrival_to_reply() -> None:
    books = RequestBooks(100.0)
    books.submitted(101.0)
    books.took(output(Account(101.0, 103.0, {Cause.PREFILL: 2.0}, 7)), 103.5)
    books.taken(103.75)
    assert parts(books, 104.0) == {Cause.FRONT: 1.0, Cause.PREFILL: 2.0, Cause.DELIVERY: 1.0}
    assert books.explain(104.0).device_ns == 7


def test_a_slow_reader() -> None:
    books = RequestBooks(100.0)
    books.submitted(101.0)
    books.took(output(Account(101.0, 103.0, {Cause.PREFILL: 2.0})), 103.5, reader_waits=False)
    books.taken(110.0)
    found = parts(books, 110.5)
    assert (found[Cause.SLOW_READER], found[Cause.DELIVERY]) == (6.5, 1.0)


def test_a_worker_that_died() -> None:
    """What its last output told counts, and is paid; what came after is the restart."""
    books = RequestBooks(100.0)
    books.submitted(101.0)
    books.took(output(Account(101.0, 102.0, {Cause.PREFILL: 1.0}, 5)), 102.0)
    books.took(output(Account(101.0, 103.0, {Cause.PREFILL: 1.0, Cause.DECODE: 1.0}, 6)), 103.0)
    books.took(output(Account(108.0, 110.0, {Cause.PREFILL: 2.0}, 10)), 110.0)
    found = parts(books, 110.0)
    assert found == {Cause.FRONT: 1.0, Cause.PREFILL: 3.0, Cause.DECODE: 1.0, Cause.WORKER_RESTART: 5.0}
    assert books.explain(110.0).device_ns == 16


def test_the_sample_that_ended_last_is_explained_and_all_are_paid() -> None:
    books = RequestBooks(100.0)
    books.took(output(Account(100.0, 105.0, {Cause.DECODE: 5.0}, 3), sample=1), 105.0)
    books.took(output(Account(100.0, 107.0, {Cause.NO_SEAT: 7.0}, 4), sample=0), 107.0)
    assert parts(books, 107.0) == {Cause.NO_SEAT: 7.0}
    assert books.explain(107.0).device_ns == 7


def test_nothing_to_compute() -> None:
    assert parts(RequestBooks(100.0), 101.5) == {Cause.FRONT: 1.5}


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=len(Cause)))
def test_the_message_sums_to_the_nanosecond(durations: list[float]) -> None:
    seconds = dict(zip(Cause, durations, strict=False))
    books = RequestBooks(0.0)
    total = sum(durations)
    found = replace(books.explain(0.0), seconds=seconds, device_ns=123)
    message = convert.explanation(found, total)
    assert sum(part.duration.ToNanoseconds() for part in message.parts) == round(total * 1e9)
    assert message.device_time.ToNanoseconds() == 123


def test_every_cause_has_its_name_on_the_wire_and_in_the_client() -> None:
    from salver.client import LatencyCause

    names = [name.removeprefix("LATENCY_CAUSE_") for name in explanation_pb2.LatencyCause.keys()]  # noqa: SIM118
    assert names[1:] == [cause.name for cause in Cause] == [cause.name for cause in LatencyCause]


def test_the_last_message_of_a_stream_whose_reader_was_slow() -> None:
    """The reader takes a message while the rest comes: what it then waits for is itself."""
    from unit.test_outputs import FakeEngine, ids, request, stream

    async def run() -> dict[Cause, float]:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        wanted = stream(FakeEngine(), request(max_tokens=3, arrival=begin, explain=True))
        wanted.start()

        def put(text: str, reason: FinishReason | None = None) -> None:
            account = Account(begin, loop.time(), {Cause.DECODE: loop.time() - begin})
            wanted.put(SequenceOutput(7, 0, ids(text), finish_reason=reason, account=account))

        put("a")
        await anext(wanted)
        put("bc", FinishReason.LENGTH)
        await asyncio.sleep(0.02)  # it is still writing the message before
        assert (await anext(wanted)).finished
        found = wanted.explain(loop.time())
        assert found is not None
        return found.seconds

    assert asyncio.run(run())[Cause.SLOW_READER] >= 0.019
