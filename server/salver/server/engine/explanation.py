"""What the front adds to the worker's books of a request: the way in, restarts, the way out."""

from __future__ import annotations

from dataclasses import dataclass

from salver.server.engine.accounting import Account, Cause
from salver.server.engine.request import SequenceOutput


@dataclass(frozen=True, slots=True)
class Explanation:
    """Seconds by cause, from a request's arrival to its reply; and its share of the device's time."""

    seconds: dict[Cause, float]
    device_ns: int


class RequestBooks:
    """Gathers the accounts of everything that one call has the engine compute.

    The time is explained along what ended last: one sample, or one input, from its arrival to its end.
    The bill is of all.
    """

    def __init__(self, arrival: float) -> None:
        self._arrival = arrival
        self._submitted = arrival
        # By engine request and sample: the account in each worker that had it, by when it was submitted.
        self._accounts: dict[tuple[int, int], dict[float, Account]] = {}
        self._last: tuple[int, int] | None = None
        self._ended: float | None = None
        self._reader_waited = True
        self._taken: float | None = None

    def submitted(self, now: float) -> None:
        """The front has done its part."""
        self._submitted = now

    def took(self, output: SequenceOutput, now: float, reader_waits: bool = True) -> None:
        """The front has taken an output, for a reader who waits for it or is still busy."""
        if output.account is None:
            return
        self._last = (output.request_id, output.sample_index)
        self._accounts.setdefault(self._last, {})[output.account.submitted] = output.account
        self._ended, self._reader_waited = now, reader_waits

    def taken(self, now: float) -> None:
        """The reader has taken the end."""
        self._taken = now

    def explain(self, now: float) -> Explanation:
        """Of the reply that is made now."""
        seconds: dict[Cause, float] = {}
        cursor = self._arrival

        def until(cause: Cause, moment: float) -> None:
            nonlocal cursor
            seconds[cause] = seconds.get(cause, 0.0) + (moment - cursor)
            cursor = moment

        if self._last is None or self._ended is None:  # nothing was to be computed
            until(Cause.FRONT, now)
            return Explanation(seconds, 0)
        until(Cause.FRONT, self._submitted)
        for account in self._accounts[self._last].values():
            if account.submitted > cursor:
                until(Cause.WORKER_RESTART, account.submitted)
            for cause, spent in account.seconds.items():
                seconds[cause] = seconds.get(cause, 0.0) + spent
            cursor = account.mark
        until(Cause.DELIVERY, self._ended)
        if self._taken is not None and not self._reader_waited:
            until(Cause.SLOW_READER, self._taken)
        until(Cause.DELIVERY, now)
        bill = sum(account.device_ns for workers in self._accounts.values() for account in workers.values())
        return Explanation(seconds, bill)
