"""What Prometheus sees of the adapters, read when it asks.

A gateway routes by `lora_requests_info`, which has the shape that the inference extension of the Gateway
API asks for (its model server protocol): labels with names, comma-separated, and the time as its value.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

INFO_LABELS = ("running_lora_adapters", "waiting_lora_adapters", "max_lora")


class AdaptersView(Protocol):
    """What is read of the adapters."""

    @property
    def limit(self) -> int: ...
    def versions(self) -> list[tuple[str, str, bool]]: ...
    def requests(self) -> tuple[Counter[str], Counter[str]]: ...


class AdapterCollector(Collector):
    """Without samples where the server can have no adapters."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.adapters: AdaptersView | None = None

    def collect(self) -> Iterator[Any]:
        info = GaugeMetricFamily(
            "salver_lora_requests_info",
            "Names of the adapters that requests run with and wait for; the value is the time, in seconds.",
            labels=INFO_LABELS,
        )
        served = GaugeMetricFamily("salver_adapters", "Adapters that are served.", labels=["model"])
        retired = GaugeMetricFamily(
            "salver_adapters_retired",
            "Versions of adapters that are kept for calls that began with them.",
            labels=["model"],
        )
        running = GaugeMetricFamily(
            "salver_adapter_requests_running",
            "Requests that the engine computes.",
            labels=["model", "adapter"],
        )
        waiting = GaugeMetricFamily(
            "salver_adapter_requests_waiting",
            "Requests that wait in the engine.",
            labels=["model", "adapter"],
        )
        if self.adapters is not None and self.adapters.limit:
            versions = self.adapters.versions()
            by_key = [Counter[str](), Counter[str]()]
            for counted, found in zip(by_key, self.adapters.requests(), strict=True):
                for key, name, _ in versions:
                    counted[name] += found[key]
            names = [",".join(sorted(name for name in counted if counted[name])) for counted in by_key]
            info.add_metric([*names, str(self.adapters.limit)], time.time())
            num_retired = sum(is_retired for _, _, is_retired in versions)
            served.add_metric([self._model], len(versions) - num_retired)
            retired.add_metric([self._model], num_retired)
            for family, counted in zip((running, waiting), by_key, strict=True):
                for name in sorted(counted):
                    family.add_metric([self._model, name], counted[name])
        yield from (info, served, retired, running, waiting)
