"""Where a sequence's time goes, and which part of the device's time is its: the books of the engine.

A sequence that is to be explained has an `Account`. Its `mark` says until when its time has a cause;
each event moves the mark on and gives what lies between to one cause, so the causes sum to the time from
`submitted` to `mark` by construction.

*In the queue.* What keeps the first of a queue keeps all behind it, so `WaitClocks` has one clock for
each tenant and cause: a sequence reads them when it comes and when it goes, and ten thousand that wait
cost a step nothing.

*In a step.* A step takes about `base + sum of w`, where w of a sequence is what its newest token costs and
what each further one (of a prompt, or a draft) costs; the three are learned from the steps themselves
(`StepTimes`). Of the step's time, (base + w) / (base + sum of w) is the sequence's own: so long it would
have taken alone. The rest is interference.

*The bill.* The step's busy time is divided in proportion to w, in whole nanoseconds, so that the shares of
a step sum to it exactly. What the step costs anyhow is divided by that too. The length of the contexts
that a token reads does not count.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from salver.server.step_times import StepTimes

if TYPE_CHECKING:
    from salver.server.engine.schedule import Scheduled
    from salver.server.engine.sequence import Sequence as EngineSequence


class Cause(enum.Enum):
    """What a request waits for, or is computed by. In the order in which a request meets them."""

    FRONT = "front"  # checked, admitted, tokenized; its grammar compiled
    STEP_IN_PROGRESS = "step_in_progress"  # on its way to the worker, which looks between steps
    NO_SEAT = "no_seat"  # as many sequences as run at once (max_num_seqs) run
    NO_BLOCKS = "no_blocks"  # the cache has no room for it
    NO_TOKENS = "no_tokens"  # the steps are full (max_num_batched_tokens)
    OTHER_TENANT = "other_tenant"  # another tenant's turn, whose request came later
    PREFILL = "prefill"  # its own tokens, up to the first one of the answer
    DECODE = "decode"  # its own tokens, after that
    INTERFERENCE = "interference"  # its steps took longer for what others computed in them
    BETWEEN_STEPS = "between_steps"  # the engine's loop: messages, the next step's choice
    RECOMPUTATION = "recomputation"  # preempted: waiting again, and computing again what it had
    WORKER_RESTART = "worker_restart"  # the worker died: until a new one had the request
    DELIVERY = "delivery"  # from the end of its last step to the reply: detokenized, made a message
    SLOW_READER = "slow_reader"  # the end was there, and the client still took what was before it


@dataclass(slots=True)
class Account:
    """The books of one sequence in one worker; beams of a request have one together.

    Seconds of the monotonic clock; the bill in nanoseconds.
    """

    submitted: float
    mark: float
    seconds: dict[Cause, float] = field(default_factory=dict)
    device_ns: int = 0
    lost: int = 0  # tokens that it had computed before it was preempted; 0: computed again
    waits: dict[Cause, float] = field(default_factory=dict)  # the queue's clocks when it came

    def spend(self, cause: Cause, now: float) -> None:
        """Until now it was that."""
        self.seconds[cause] = self.seconds.get(cause, 0.0) + (now - self.mark)
        self.mark = now

    def follow(self, leader: Account) -> None:
        """Its time so far was the leader's, whose prompt it shares. The bill stays the leader's."""
        self.seconds, self.mark = dict(leader.seconds), leader.mark

    def preempted(self, now: float, num_computed_tokens: int) -> None:
        """Out of the batch: what was computed is lost."""
        self.spend(Cause.BETWEEN_STEPS, max(now, self.mark))  # beams: as the step before ends
        self.lost = max(self.lost, num_computed_tokens)


class WaitClocks:
    """Why the first of each tenant's queue is not taken, and how long it has been so."""

    def __init__(self) -> None:
        self.now = 0.0  # of the last look
        self._causes: dict[str, Cause] = {}  # by tenant, since then
        self._seconds: dict[str, dict[Cause, float]] = {}

    def advance(self, now: float) -> None:
        """A step is about to be chosen: what kept them has kept them until now."""
        elapsed, self.now = now - self.now, now
        for tenant, cause in self._causes.items():
            clocks = self._seconds.setdefault(tenant, {})
            clocks[cause] = clocks.get(cause, 0.0) + elapsed

    def hold(self, cause: Cause, passed_over: Mapping[str, bool]) -> None:
        """The step is chosen. `passed_over`: of each tenant that still waits, whether for another's turn."""
        self._causes = {
            tenant: Cause.OTHER_TENANT if passed else cause for tenant, passed in passed_over.items()
        }
        if len(self._seconds) > len(passed_over):
            self._seconds = {name: clocks for name, clocks in self._seconds.items() if name in passed_over}

    def enter(self, sequence: EngineSequence) -> None:
        """It waits from now on (from its account's mark)."""
        account = sequence.account
        if account is None:
            return
        tenant = sequence.request.tenant
        account.waits = dict(self._seconds.get(tenant, ()))
        # It came between two looks: what the clocks will add for the time before was not its time.
        early, cause = account.mark - self.now, self._causes.get(tenant)
        if cause is not None and early > 0:
            account.waits[cause] = account.waits.get(cause, 0.0) + early

    def leave(self, sequence: EngineSequence) -> None:
        """It was chosen, at the last look."""
        account = sequence.account
        if account is None:
            return
        before, account.waits = account.waits, {}
        if account.lost:
            account.spend(Cause.RECOMPUTATION, self.now)
            return
        for cause, seconds in self._seconds.get(sequence.request.tenant, {}).items():
            waited = seconds - before.get(cause, 0.0)
            if waited > 0:
                account.spend(cause, account.mark + waited)
        account.spend(Cause.STEP_IN_PROGRESS, self.now)


def divide(amount: int, weights: Sequence[int]) -> list[int]:
    """`amount` in proportion to weights of at least 1: whole numbers that sum to it exactly."""
    total, seen, given = sum(weights), 0, 0
    shares = []
    for weight in weights:
        seen += weight
        until = amount * seen // total
        shares.append(until - given)
        given = until
    return shares


def _num_tokens(item: Scheduled) -> int:
    """Of its prompt and output, and of the source that an encoder reads."""
    return item.num_tokens + item.num_source_tokens


class StepAccounting:
    """Gives the time of each step to its sequences."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._weights: list[int] = []

    def computed(self, scheduled: Sequence[Scheduled], begin: float, now: float) -> None:
        """The device has computed a step; its tokens are not yet taken."""
        base = 0
        sequence = token = 1
        if self._times.known:
            base, sequence, token = (round(value * 1e12) for value in self._times.parameters)
        sequence, token = max(1, sequence), max(1, token)
        self._weights = [sequence + (_num_tokens(item) - 1) * token for item in scheduled]
        whole = base + sum(self._weights)
        parts: dict[int, tuple[Account, Scheduled, int]] = {}
        for item, weight in zip(scheduled, self._weights, strict=True):
            if (account := item.sequence.account) is not None:
                _, first, others = parts.get(id(account), (account, item, 0))
                parts[id(account)] = (account, first, others + weight)
        for account, item, weight in parts.values():
            # Steps overlap on a GPU: what happened to it since this one was launched has its cause already.
            since = max(begin, account.mark)
            account.spend(Cause.BETWEEN_STEPS, since)
            if account.lost > item.start:
                account.spend(Cause.RECOMPUTATION, now)
                continue
            account.lost = 0
            own = Cause.PREFILL if item.sequence.first_token is None else Cause.DECODE
            account.spend(own, since + (now - since) * (base + weight) / whole)
            account.spend(Cause.INTERFERENCE, now)

    def charge(self, scheduled: Sequence[Scheduled], seconds: float) -> tuple[tuple[str, int], ...]:
        """Divides the same step's busy time; what each tenant has of it, in nanoseconds."""
        num_tokens = sum(map(_num_tokens, scheduled))
        self._times.observe(len(scheduled), num_tokens - len(scheduled), seconds)
        of_tenants: dict[str, int] = {}
        shares = divide(round(seconds * 1e9), self._weights)
        for item, share in zip(scheduled, shares, strict=True):
            tenant = item.sequence.request.tenant
            of_tenants[tenant] = of_tenants.get(tenant, 0) + share
            if item.sequence.account is not None:
                item.sequence.account.device_ns += share
        return tuple(of_tenants.items())
