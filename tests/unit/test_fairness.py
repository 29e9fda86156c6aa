"""Tenants: their shares under a greedy neighbour, and what one can learn of another by the clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from support.bookkeeping import BookkeepingRunner, request

from salver.server.engine.core import EngineLimits
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SequenceOutput
from salver.server.engine.schedule import Schedule
from salver.server.tenants import Tenant

LIMITS = EngineLimits(
    num_blocks=400, block_size=4, max_model_len=200, max_num_seqs=4, max_num_batched_tokens=64,
    check_integrity=True,
)  # fmt: skip


class Engine:
    """The engine under a virtual clock that a step moves on by what it computes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = InlineEngine(self, LIMITS, clock=lambda: self.now)
        self.runner = BookkeepingRunner()
        self.owners: dict[int, str] = {}
        self.served: dict[str, float] = {}  # tokens computed, by owner

    def execute(self, schedule: Schedule):  # type: ignore[no-untyped-def]
        self.now += 0.005 + 0.001 * schedule.num_tokens
        for item in schedule.scheduled:
            owner = self.owners[item.sequence.request.request_id]
            self.served[owner] = self.served.get(owner, 0) + item.num_tokens
        return self.runner.execute(schedule)

    def submit(self, item: EngineRequest, owner: str, sink: Sink) -> None:
        self.owners[item.request_id] = owner
        self.engine.submit(item, sink)


class Sink:
    """When a request's first token came, and whether it has ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.first, self.ended = engine, 0.0, False

    def started(self, seconds: float) -> None:
        pass

    def put(self, output: SequenceOutput) -> None:
        self.first = self.first or self.engine.now
        self.ended = self.ended or output.finish_reason is not None


def jain(shares: Sequence[float]) -> float:
    """1 when all are alike, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def crowd(seconds: float, tenants: dict[str, tuple[int, float]], *, told_apart: bool = True) -> Engine:
    """Each tenant (requests that it keeps in the queue, weight) sends; those of the greedy one are longer."""
    engine, rng = Engine(), random.Random(1)
    waiting: dict[str, list[Sink]] = {name: [] for name in tenants}
    number = 0
    while engine.now < seconds:
        for name, (depth, weight) in tenants.items():
            waiting[name] = [sink for sink in waiting[name] if not sink.ended]
            while len(waiting[name]) < depth:
                number += 1
                longer = 3 if name == "greedy" else 1
                prompt = [rng.randrange(50) for _ in range(rng.randrange(5, 20) * longer)]
                made = request(number, prompt, rng.randrange(5, 20) * longer, arrival=engine.now)
                if told_apart:
                    made = replace(made, tenant=name, weight=weight)
                sink = Sink(engine)
                waiting[name].append(sink)
                engine.submit(made, name, sink)
        engine.engine.step()
    return engine


def test_a_greedy_tenant_has_its_share_and_no_more() -> None:
    """One with a hundred long requests waiting, four with eight: Jain's index of what each got."""
    tenants = {"greedy": (100, 1.0), **{f"modest-{i}": (8, 1.0) for i in range(4)}}
    served = crowd(20, tenants).served
    index = jain([served[name] for name in tenants])
    assert index >= 0.95, (index, served)


def test_without_tenants_it_would_have_nearly_all() -> None:
    """The same crowd as one tenant: what the test above guards against is real."""
    tenants = {"greedy": (100, 1.0), **{f"modest-{i}": (8, 1.0) for i in range(4)}}
    served = crowd(20, tenants, told_apart=False).served
    assert jain([served[name] for name in tenants]) < 0.5, served


def test_weights_divide_the_engine() -> None:
    served = crowd(20, {"greedy": (30, 1.0), "double": (30, 2.0), "half": (30, 0.5)}).served
    shares = [served["greedy"], served["double"] / 2, served["half"] / 0.5]
    assert jain(shares) >= 0.95, served


def test_a_pause_is_not_saved_up() -> None:
    """Who comes back after a long silence shares from now on, and does not have the engine to itself."""
    engine = Engine()
    sinks = {"busy": [], "back": []}

    def submit(number: int, tenant: str) -> None:
        made = replace(request(number, [number % 50] * 8, 8, arrival=engine.now), tenant=tenant)
        sinks[tenant].append(Sink(engine))
        engine.submit(made, tenant, sinks[tenant][-1])

    submit(0, "back")
    for number in range(1, 200):
        submit(number, "busy")
    while sum(sink.ended for sink in sinks["busy"]) < 100:
        engine.engine.step()
    before = dict(engine.served)
    for number in range(200, 300):
        submit(number, "back")
    while sum(sink.ended for sink in sinks["back"]) < 40:
        engine.engine.step()
    gained = [engine.served[name] - before[name] for name in ("busy", "back")]
    assert jain(gained) >= 0.95, gained


def test_the_order_within_a_tenant_is_its_own() -> None:
    """Its priorities order its requests, and take nothing from another tenant."""
    engine = Engine()
    first: list[int] = []
    made: list[tuple[int, str, int]] = [(i, "loud", 0) for i in range(12)]
    made += [(12, "loud", 10), *((i, "quiet", 0) for i in range(13, 17))]
    sinks: dict[int, Sink] = {}
    for number, tenant, priority in made:
        sinks[number] = Sink(engine)
        item = request(number, list(range(8)), 8, priority=priority)
        engine.submit(replace(item, tenant=tenant), tenant, sinks[number])
    while len(first) < len(made):
        engine.engine.step()
        first += [n for n, sink in sinks.items() if sink.first and n not in first]
    assert first.index(12) < 2
    assert max(first.index(n) for n in range(13, 17)) < 10


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """How often a positive is faster than a negative: 1 is certainty, 0.5 is a coin."""
    pairs = [(p < n) + (p == n) / 2 for p in positives for n in negatives]
    return sum(pairs) / len(pairs)


def spied(victim: Tenant, attacker: Tenant, salt: str = "") -> float:
    """The attacker times prompts, half of which the victim has sent before; the AUC of its guesses."""
    engine, rng = Engine(), random.Random(3)
    number = 0

    def seconds_of(prompt: list[int], tenant: Tenant, salt: str) -> float:
        nonlocal number
        number += 1
        sink, start = Sink(engine), engine.now
        item: EngineRequest = request(number, prompt, 1, arrival=start)
        marked = replace(item, tenant=tenant.name, cache_salt=tenant.salted(salt))
        engine.submit(marked, tenant.name, sink)
        engine.engine.run()
        return sink.first - start

    known = [[rng.randrange(50) for _ in range(24)] for _ in range(10)]
    unknown = [[rng.randrange(50) for _ in range(24)] for _ in range(10)]
    for prompt in known:
        seconds_of(prompt, victim, "")
    probes = [(prompt, True) for prompt in known] + [(prompt, False) for prompt in unknown]
    rng.shuffle(probes)
    times = [(seconds_of(prompt, attacker, salt), sent) for prompt, sent in probes]
    return area_under_curve([t for t, sent in times if sent], [t for t, sent in times if not sent])


def test_one_tenant_cannot_time_anothers_prefixes() -> None:
    alice, eve = Tenant("alice"), Tenant("eve")
    assert spied(alice, alice) == 1.0, "the attack works where there is one cache for both"
    assert spied(alice, eve) == 0.5
    assert spied(alice, eve, "alice") == spied(alice, eve, "alice\0") == 0.5


def test_no_two_tenants_share_a_salt() -> None:
    names, salts = ("", "a", "ab", "a.b"), ("", "a", "b", "a\0b", "\0")
    made = [Tenant(name).salted(salt) for name in names[1:] for salt in salts]
    assert len(set(made)) == len(made)
