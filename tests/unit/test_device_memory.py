"""The cache's share of a GPU's memory, by a device that only counts."""

from __future__ import annotations

from collections.abc import Callable

from salver.server.engine.device_memory import CacheMemory, measure_cache_memory

GIB = 1 << 30


class FakeMemory:
    """Holds weights; a step takes `step` while it runs, and the first one leaves `workspace` behind."""

    def __init__(self, total: int, held: int, step: int, workspace: int) -> None:
        self.total, self.held, self.step_bytes, self.workspace = total, held, step, workspace
        self.now = self.most = held
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self.now += self.workspace
        self.most = max(self.most, self.now + self.step_bytes)

    def free_and_total(self) -> tuple[int, int]:
        return self.total - self.now, self.total

    def peak_of(self, work: Callable[[], object]) -> int:
        self.most = before = self.now
        work()
        return self.most - before


def test_the_cache_gets_what_the_largest_step_leaves() -> None:
    memory = FakeMemory(80 * GIB, held=16 * GIB, step=3 * GIB, workspace=GIB)
    found = measure_cache_memory(memory, memory.step, 0.9)
    assert found == CacheMemory(80 * GIB, 17 * GIB, 3 * GIB, 0.9)
    assert found.cache == 72 * GIB - 17 * GIB - 3 * GIB
    # With the cache full, the largest step just fits into the share.
    memory.now += found.cache
    memory.step()
    assert memory.most == 72 * GIB


def test_nothing_is_left_where_the_weights_take_all() -> None:
    memory = FakeMemory(24 * GIB, held=22 * GIB, step=GIB, workspace=0)
    found = measure_cache_memory(memory, memory.step, 0.9)
    assert found.cache == 0
    assert "24.00 GiB" in str(found) and "22.00 GiB" in str(found) and "0.9" in str(found)
