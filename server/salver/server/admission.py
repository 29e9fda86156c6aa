"""Who may wait. The queue is bounded by requests and by prompt tokens; beyond, the answer is immediate.

So it is for a request that would not end before its deadline (`forecast`): it would only take the
device's time from those that can. Not when the engine is idle, nor while speeds are unknown. One whose
deadline is too short for its length on an idle machine too has a client that is content with a part
of the answer: it is refused when not even its first token would come in time. One that resumes is taken:
its client has a part already, and another server has lost it.

A permit is held from before a request is tokenized until the engine has started it. As many
requests as the batch has free places for are on their way in and not waiting: a burst on an
idle server is not a full queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from salver.server.engine.request import NO_DEADLINE, EngineRequest, Ready
from salver.server.forecast import Forecast
from salver.server.rpc.errors import ApiError, deadline_too_short, queue_full


class Permit:
    """The place of one call: `requests` requests and, once tokenized, their tokens."""

    __slots__ = ("_admission", "_foretold", "_request_ids", "_requests", "_running", "_tokens")

    def __init__(self, admission: Admission, requests: int) -> None:
        self._admission = admission
        self._requests = requests
        self._running = 0
        self._tokens = 0
        self._foretold: dict[int, float | None] = {}
        self._request_ids: list[int] = []
        admission.waiting_requests += requests

    def add_tokens(self, count: int) -> None:
        """Says how many prompt tokens wait. Raises ApiError (RESOURCE_EXHAUSTED) when too many do."""
        self._admission.check_tokens(count)
        self._tokens += count
        self._admission.waiting_tokens += count

    @property
    def forecast(self) -> Forecast:
        return self._admission.forecast

    def check_deadline(self, requests: Sequence[EngineRequest]) -> None:
        """Of requests that are about to be submitted together.

        Raises ApiError (RESOURCE_EXHAUSTED) when the last of them would end too late.
        """
        if requests:
            self._foretold[requests[-1].request_id] = self._admission.check_deadline(requests)

    def submitted(self, request: EngineRequest) -> None:
        """The engine has it; from now on it delays others, until it has ended."""
        self.forecast.entered(request, self._foretold.get(request.request_id))
        self._request_ids.append(request.request_id)

    def started(self, tokens: int, sequences: int = 1) -> None:
        """One of the requests runs now, in so many places of the batch; its `tokens` wait no more."""
        if not self._requests:
            return
        tokens = min(tokens, self._tokens)
        self._requests -= 1
        self._tokens -= tokens
        self._running += sequences
        self._admission.waiting_requests -= 1
        self._admission.waiting_tokens -= tokens
        self._admission.running_sequences += sequences

    def release(self) -> None:
        """Gives back what is still held. Again is no harm."""
        self._admission.waiting_requests -= self._requests
        self._admission.waiting_tokens -= self._tokens
        self._admission.running_sequences -= self._running
        self._requests = self._tokens = self._running = 0
        for request_id in self._request_ids:
            self.forecast.ended(request_id)
        self._request_ids.clear()


class Admission:
    """Bounds what waits. `rejected` is told `queue_requests`, `queue_tokens` or `deadline` of each refusal.

    `places` is how many sequences the engine computes at once (max_num_seqs, once it is known).
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        rejected: Callable[[str], None],
        *,
        deadlines: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadlines`: whether requests that would end too late are refused."""
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.places = 0
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.running_sequences = 0
        self.forecast = Forecast(clock)
        self._deadlines = deadlines
        self._clock = clock
        self._rejected = rejected

    def ready(self, ready: Ready) -> None:
        """The model is loaded: what the engine holds at once."""
        self.places = self.forecast.places = ready.max_num_seqs
        # Block 0 is the null block of padding rows.
        self.forecast.cache_tokens = (ready.num_blocks - 1) * ready.block_size
        self.forecast.block_size = ready.block_size

    def admit(self, requests: int = 1) -> Permit:
        """A permit for `requests` requests at once. Raises ApiError (RESOURCE_EXHAUSTED) when too many wait.

        An empty queue takes any call, or one larger than the bound could never be served.
        """
        free = max(0, self.places - self.running_sequences)
        if self.waiting_requests and self.waiting_requests + requests > self.max_requests + free:
            raise self._refusal(
                "queue_requests", f"{self.waiting_requests} requests (of at most {self.max_requests})"
            )
        return Permit(self, requests)

    def check_tokens(self, count: int) -> None:
        """Raises ApiError (RESOURCE_EXHAUSTED) when `count` more prompt tokens are too many."""
        if self.waiting_tokens and self.waiting_tokens + count > self.max_tokens:
            raise self._refusal(
                "queue_tokens", f"{self.waiting_tokens} prompt tokens (of at most {self.max_tokens})"
            )

    def check_deadline(self, requests: Sequence[EngineRequest]) -> float | None:
        """In how many seconds the last of these would end, uncorrected; None: not known, or not wanted.

        Raises ApiError (RESOURCE_EXHAUSTED) when that is too late.
        """
        request, forecast = requests[-1], self.forecast
        left = request.deadline - self._clock()
        if request.deadline == NO_DEADLINE or left <= 0:
            return None
        estimate = forecast.estimate(requests)
        if estimate is None:
            return None
        resumed = any(request.outputs)
        if self._deadlines and not (forecast.idle or resumed):
            wanted = estimate.end
            if forecast.alone(request).end > left:
                wanted = estimate.first_token
            late = wanted * forecast.correction - left
            if late > 0:
                self._rejected("deadline")
                raise deadline_too_short(left + late, left)
        return estimate.end

    def _refusal(self, reason: str, waiting: str) -> ApiError:
        self._rejected(reason)
        return queue_full(waiting)
