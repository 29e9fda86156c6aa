"""What a GPU's gauges show, written to the status page about once a second.

Memory comes from the driver through torch; utilization from NVML, where `nvidia-ml-py` is installed
(`pip install salver[gpu]`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from salver.server.engine.status_page import StatusPage

PERIOD = 1.0  # seconds; asking the driver takes up to a millisecond


def read_gpu(device: torch.device) -> tuple[int, int, int | None]:
    """Bytes used by all processes, bytes in all, and percent of the time that it computed, if NVML tells."""
    free, total = torch.cuda.mem_get_info(device)
    try:
        utilization: int | None = torch.cuda.utilization(device)
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or a driver that does not tell
        utilization = None
    return total - free, total, utilization


class GpuGauges:
    """Writes what `read` gives (as `read_gpu`) to the page."""

    def __init__(
        self,
        page: StatusPage,
        read: Callable[[], tuple[int, int, int | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._page = page
        self._read = read
        self._clock = clock
        self._next = 0.0

    @classmethod
    def of_this_process(cls, page: StatusPage) -> GpuGauges | None:
        """None where this process does not use a GPU."""
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(page, lambda: read_gpu(device))

    def publish(self) -> None:
        """Cheap when it is not time yet."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + PERIOD
        used, total, utilization = self._read()
        self._page.gpu_memory_used = used
        self._page.gpu_memory_total = total
        self._page.gpu_utilization = 0 if utilization is None else utilization + 1
