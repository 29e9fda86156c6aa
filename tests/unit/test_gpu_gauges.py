"""A GPU's memory and utilization on the status page, and from there among the metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest

from salver.server.engine.gpu_gauges import GpuGauges
from salver.server.engine.status_page import StatusPage
from salver.server.metrics import Metrics


def shown(page: StatusPage) -> dict[str, float]:
    metrics = Metrics("m")
    worker: Any = SimpleNamespace(page=page, restarts=0)
    metrics.worker.worker = worker
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("salver_gpu")}


def test_the_gauges_follow_the_device_about_once_a_second() -> None:
    page = StatusPage.create()
    now = [100.0]
    readings: list[tuple[int, int, int | None]] = [(3 << 30, 80 << 30, 0), (5 << 30, 80 << 30, 97)]
    asked = []

    def read() -> tuple[int, int, int | None]:
        asked.append(now[0])
        return readings[min(len(asked), len(readings)) - 1]

    gauges = GpuGauges(page, read, clock=lambda: now[0])
    gauges.publish()
    assert shown(page) == {
        "salver_gpu_memory_used_bytes": 3 << 30,
        "salver_gpu_memory_total_bytes": 80 << 30,
        "salver_gpu_utilization_ratio": 0.0,
    }
    now[0] += 0.5
    gauges.publish()
    assert len(asked) == 1
    now[0] += 0.6
    gauges.publish()
    assert len(asked) == 2 and shown(page)["salver_gpu_utilization_ratio"] == 0.97
    page.retire_worker()
    assert shown(page) == {}
    page.close()


def test_without_nvml_only_the_memory_is_shown() -> None:
    page = StatusPage.create()
    GpuGauges(page, lambda: (1, 2, None)).publish()
    assert shown(page) == {"salver_gpu_memory_used_bytes": 1, "salver_gpu_memory_total_bytes": 2}
    page.close()


def test_without_a_gpu_nothing_is_shown() -> None:
    page = StatusPage.create()
    assert GpuGauges.of_this_process(page) is None
    assert shown(page) == {}
    page.close()
