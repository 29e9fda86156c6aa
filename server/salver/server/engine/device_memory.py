"""How much of a GPU's memory the key-value cache gets: what a step of the largest size leaves free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Memory(Protocol):
    """A device's memory, in bytes."""

    def free_and_total(self) -> tuple[int, int]:
        """What the whole machine has left of the device, with this process's unused reserve given back."""
        ...

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most that `work` holds beyond what was held before it."""
        ...


class CudaMemory:
    """Of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def peak_of(self, work: Callable[[], object]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device)) - before


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """What was measured, and what follows. Bytes.

    Attributes:
        total: of the device.
        used: before the cache: weights, what the driver and other processes hold.
        step: the most that a step of the largest size takes beside them.
        utilization: the share of the total that this engine may bring the device to.
    """

    total: int
    used: int
    step: int
    utilization: float

    @property
    def cache(self) -> int:
        """Left for the cache; 0 where nothing is."""
        return max(0, int(self.total * self.utilization) - self.used - self.step)

    def __str__(self) -> str:
        parts = (self.total, self.used, self.step)
        total, used, step = (f"{part / 2**30:.2f} GiB" for part in parts)
        return (
            f"of {total} the share of {self.utilization:g}, less {used} that are taken (weights, driver, "
            f"other processes) and {step} for the largest step"
        )


def measure_cache_memory(
    memory: Memory, largest_step: Callable[[], object], utilization: float
) -> CacheMemory:
    """Runs the largest step twice: the first time also loads kernels and makes workspaces, which stay."""
    largest_step()
    step = memory.peak_of(largest_step)
    free, total = memory.free_and_total()
    return CacheMemory(total, total - free, step, utilization)
