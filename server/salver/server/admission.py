"""Who may wait. The queue is bounded by requests and by prompt tokens; beyond, the answer is immediate.

A permit is held from before a request is tokenized until the engine has started it. As many
requests as the batch has free places for are on their way in and not waiting: a burst on an
idle server is not a full queue.
"""

from __future__ import annotations

from collections.abc import Callable

from salver.server.rpc.errors import ApiError, queue_full


class Permit:
    """The place of one call: `requests` requests and, once tokenized, their tokens."""

    __slots__ = ("_admission", "_requests", "_running", "_tokens")

    def __init__(self, admission: Admission, requests: int) -> None:
        self._admission = admission
        self._requests = requests
        self._running = 0
        self._tokens = 0
        admission.waiting_requests += requests

    def add_tokens(self, count: int) -> None:
        """Says how many prompt tokens wait. Raises ApiError (RESOURCE_EXHAUSTED) when too many do."""
        self._admission.check_tokens(count)
        self._tokens += count
        self._admission.waiting_tokens += count

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


class Admission:
    """Bounds what waits. `rejected` is told `queue_requests` or `queue_tokens` of each refusal.

    `places` is how many sequences the engine computes at once (max_num_seqs, once it is known).
    """

    def __init__(self, max_requests: int, max_tokens: int, rejected: Callable[[str], None]) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.places = 0
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.running_sequences = 0
        self._rejected = rejected

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

    def _refusal(self, reason: str, waiting: str) -> ApiError:
        self._rejected(reason)
        return queue_full(waiting)
