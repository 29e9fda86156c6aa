"""Who of those that wait is next: fairness between tenants, then the order of each one's own requests.

Standard library only. Each tenant is charged for what the engine computes for it: the prompt
tokens of a request when it starts, each output token as it comes, divided by the tenant's weight.
The next request is the first one of the tenant that was charged least (the virtual token counter of
Sheng et al., "Fairness in Serving Large Language Models", 2024). So a tenant that sends a thousand
requests delays its own, and its priorities and deadlines order its own.

A tenant that comes back after a pause starts at the count of whoever was chosen last: it is owed
nothing for the time that it did not use. With one tenant this is one queue in the order of its keys.
"""

from __future__ import annotations

import heapq

from salver.server.engine.sequence import OrderKey, Sequence, SequenceStatus


class WaitingQueue:
    """The waiting sequences. Entries that left by themselves (aborted) are skipped."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[OrderKey, Sequence]]] = {}  # of tenants of whom one waits
        self._served: dict[str, float] = {}  # tokens by weight
        self._floor = 0.0  # the count of the tenant that was chosen last

    def push(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        heap = self._heaps.get(tenant)
        if heap is None:
            heap = self._heaps[tenant] = []
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        heapq.heappush(heap, (sequence.key, sequence))

    def best(self) -> Sequence | None:
        """The next one; it stays until `pop`."""
        while self._heaps:
            tenant = self._next_tenant()
            heap = self._heaps[tenant]
            first = self._first(heap)
            if first is not None:
                return first
            del self._heaps[tenant]
        return None

    def pop(self, sequence: Sequence) -> None:
        """Takes out what `best` gave."""
        tenant = sequence.request.tenant
        heap = self._heaps[tenant]
        heapq.heappop(heap)
        self._floor = max(self._floor, self._served[tenant])
        if not heap:
            del self._heaps[tenant]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """The engine computes, or has computed, so much for the sequence's tenant."""
        request = sequence.request
        self._served[request.tenant] = self._served.get(request.tenant, 0.0) + num_tokens / request.weight

    def passed_over(self) -> dict[str, bool]:
        """Of each tenant that waits, whether its first request is before the one that `best` gives."""
        best = self.best()
        if best is None:
            return {}
        passed: dict[str, bool] = {}
        for tenant, heap in list(self._heaps.items()):
            first = self._first(heap)
            if first is None:
                del self._heaps[tenant]
            else:
                passed[tenant] = first.key < best.key
        return passed

    @staticmethod
    def _first(heap: list[tuple[OrderKey, Sequence]]) -> Sequence | None:
        while heap and heap[0][1].status is not SequenceStatus.WAITING:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _next_tenant(self) -> str:
        if len(self._heaps) == 1:
            return next(iter(self._heaps))
        return min(self._heaps, key=lambda tenant: (self._served[tenant], self._heaps[tenant][0][0]))
