"""What Prometheus sees. Fixed labels, every label set there from the start, nothing approximate.

Counters and histograms are fed by the front as things happen. What the worker knows (queues,
cache, steps) it keeps on its status page, and gauges and counters are read from there when
Prometheus asks, with the page's age beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from salver.server.adapter_metrics import AdapterCollector
from salver.server.engine.request import SequenceTimings, StepMessage

FINISH_REASONS = ("stop", "length", "abort", "score", "encode")
REJECTIONS = (
    *("queue_requests", "queue_tokens", "deadline", "loading", "draining", "unavailable"),
    *("unauthenticated", "permission_denied", "tenant_rate"),
)
RELOADS = ("tls", "tokens", "admin_tls", "admin_token_file")

# Seconds. From 1 ms, where a cached prefix on a small model answers, to the longest generations.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
# Gaps between tokens and lengths of steps: finer where they are.
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTH_BUCKETS = (*TOKEN_BUCKETS, 32768, 65536, 131072)
SEQUENCE_BUCKETS = TOKEN_BUCKETS[:11]


class Page(Protocol):
    """What is read of the worker's status page."""

    @property
    def updated(self) -> float: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def accepted_draft_tokens(self) -> int: ...
    @property
    def gpu_memory_used(self) -> int: ...
    @property
    def gpu_memory_total(self) -> int: ...
    @property
    def gpu_utilization(self) -> int: ...


class WorkerView(Protocol):
    """What is read of the engine when Prometheus asks."""

    @property
    def page(self) -> Page: ...
    @property
    def restarts(self) -> int: ...


class WorkerCollector(Collector):
    """Metrics read from the worker's status page at scrape time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.worker: WorkerView | None = None

    def collect(self) -> Iterator[Any]:
        worker = self.worker
        page = worker.page if worker is not None else None

        def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
            family = GaugeMetricFamily(f"salver_{name}", text, labels=["model"])
            family.add_metric([self._model], value)
            return family

        def counter(name: str, text: str, value: float) -> CounterMetricFamily:
            family = CounterMetricFamily(f"salver_{name}", text, labels=["model"])
            family.add_metric([self._model], value)
            return family

        running, waiting = (page.num_running, page.num_waiting) if page else (0, 0)
        used, total = (page.kv_blocks_used, page.kv_blocks_total) if page else (0, 0)
        age = max(0.0, time.monotonic() - page.updated) if page and page.updated else 0.0
        yield gauge("num_requests_running", "Sequences in the running batch.", running)
        yield gauge("num_requests_waiting", "Sequences waiting to be scheduled.", waiting)
        yield gauge(
            "kv_cache_usage_ratio",
            "Share of the cache's blocks that sequences own.",
            used / total if total else 0,
        )
        yield gauge("worker_page_age_seconds", "Time since the worker wrote its status page.", age)
        yield counter(
            "preemptions", "Sequences taken out of the batch to free blocks.", page.preemptions if page else 0
        )
        yield counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            page.prefix_queries if page else 0,
        )
        yield counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", page.prefix_hits if page else 0
        )
        yield counter(
            "draft_tokens", "Guesses at next tokens that steps checked.", page.draft_tokens if page else 0
        )
        yield counter(
            "accepted_draft_tokens",
            "Guesses at next tokens that were right.",
            page.accepted_draft_tokens if page else 0,
        )
        if page and page.gpu_memory_total:
            used, total = page.gpu_memory_used, page.gpu_memory_total
            yield gauge("gpu_memory_used_bytes", "Memory of the GPU in use, by all processes.", used)
            yield gauge("gpu_memory_total_bytes", "Memory of the GPU.", total)
            if page.gpu_utilization:
                share = (page.gpu_utilization - 1) / 100
                yield gauge("gpu_utilization_ratio", "Share of the last second that the GPU computed.", share)
        yield counter("worker_restarts", "Worker processes started anew.", worker.restarts if worker else 0)


class Metrics:
    """All metrics of one server, in a registry of their own.

    `methods` are the full method names (`/salver.v1.ModelService/GetModel`) with whether they
    stream: (request, response); `codes` the status names that a call can end with. `build` are
    the labels of build_info.
    """

    def __init__(
        self,
        model: str,
        *,
        methods: Mapping[str, tuple[bool, bool]] | None = None,
        codes: Sequence[str] = (),
        build: Mapping[str, str] | None = None,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge for the creation time of every series, which nobody reads
        self.registry = CollectorRegistry()
        self.worker = WorkerCollector(model)
        self.registry.register(self.worker)
        self.adapters = AdapterCollector(model)
        self.registry.register(self.adapters)
        ProcessCollector(registry=self.registry)
        info = Info("salver_build", "Version of the server.", registry=self.registry)
        info.info(dict(build or {}))

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(
                f"salver_{name}", text, ["model"], buckets=tuple(buckets), registry=self.registry
            )
            return family.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"salver_{name}", text, ["model"], registry=self.registry).labels(model)

        self._first_token = histogram(
            "time_to_first_token_seconds",
            "Arrival of a request to the first token of each sample.",
            LATENCY_BUCKETS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Gap between two tokens of a sample.", STEP_BUCKETS
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "Arrival of a request to its end.", LATENCY_BUCKETS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Arrival of a request to its first step.", LATENCY_BUCKETS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "First step of a request to its first token.", LATENCY_BUCKETS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "First token of a request to its last.", LATENCY_BUCKETS
        )
        self._prompt_tokens = counter("prompt_tokens_total", "Tokens of the prompts that were started.")
        self._generation_tokens = counter("generation_tokens_total", "Tokens generated.")
        self._prompt_length = histogram(
            "request_prompt_tokens", "Tokens of the prompts (or texts) of a request.", LENGTH_BUCKETS
        )
        self._sample_length = histogram(
            "request_generation_tokens", "Tokens of a sample at its end.", LENGTH_BUCKETS
        )
        self._longest_sample = histogram(
            "request_max_generation_tokens", "Tokens of the longest sample of a request.", LENGTH_BUCKETS
        )
        self._batch_tokens = histogram("batch_tokens", "Tokens computed in a step.", TOKEN_BUCKETS)
        self._batch_sequences = histogram(
            "batch_sequences", "Sequences computed in a step.", SEQUENCE_BUCKETS
        )
        self._step_duration = histogram("step_duration_seconds", "Duration of a step.", STEP_BUCKETS)
        self._step_model_duration = histogram(
            "step_model_duration_seconds", "Of a step, inside the model's forward pass.", STEP_BUCKETS
        )

        self._weights_version = Gauge(
            "salver_weights_version", "Of the base's weights: 1 at the start, one more with every update.",
            ["model"], registry=self.registry,
        ).labels(model)  # fmt: skip
        self._weights_version.set(1)
        self._weights_pause = histogram(
            "weights_update_pause_seconds", "How long steps stood still for other weights.", LATENCY_BUCKETS
        )

        self._model = model
        self._device_seconds = Counter(
            "salver_device_seconds_total", "Time of steps, divided among the tenants for whom they computed.",
            ["model", "tenant"], registry=self.registry,
        )  # fmt: skip
        self._device_seconds.labels(model, "")  # of a server without tokens, everybody
        rejections = Counter(
            "salver_rejections_total", "Requests refused: for want of capacity, or of the right to call.",
            ["model", "reason"], registry=self.registry,
        )  # fmt: skip
        self._rejections = {reason: rejections.labels(model, reason) for reason in REJECTIONS}
        success = Counter(
            "salver_request_success_total", "Samples that ended, and score inputs, by how they ended.",
            ["model", "finish_reason"], registry=self.registry,
        )  # fmt: skip
        self._success = {reason: success.labels(model, reason) for reason in FINISH_REASONS}

        reloads = Counter(
            "salver_reloads_total", "Files read again because they had changed, by whether they were good.",
            ["what", "result"], registry=self.registry,
        )  # fmt: skip
        self._reloads = {
            (what, good): reloads.labels(what, "good" if good else "bad")
            for what in RELOADS
            for good in (True, False)
        }

        self._startup = Gauge(
            "salver_startup_phase_seconds", "Duration of each part of the start, once it has ended.",
            ["model", "phase"], registry=self.registry,
        )  # fmt: skip

        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started_total", "Calls started.", labels, registry=self.registry)
        self._handled = Counter(
            "grpc_server_handled_total",
            "Calls ended, by status.",
            [*labels, "grpc_code"],
            registry=self.registry,
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Duration of calls.", labels, buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._methods: dict[str, tuple[str, str, str]] = {}
        for method, streaming in (methods or {}).items():
            names = _method_labels(method, *streaming)
            self._methods[method] = names
            self._started.labels(*names)
            self._handling.labels(*names)
            for code in codes:
                self._handled.labels(*names, code)

    def rpc_started(self, method: str) -> None:
        """A call of a known method came in; other methods are not counted (labels stay bounded)."""
        names = self._methods.get(method)
        if names is not None:
            self._started.labels(*names).inc()

    def rpc_handled(self, method: str, code: str, seconds: float) -> None:
        names = self._methods.get(method)
        if names is not None:
            self._handled.labels(*names, code).inc()
            self._handling.labels(*names).observe(seconds)

    def started_up(self, phase: str, seconds: float) -> None:
        """A part of the start has ended."""
        self._startup.labels(self._model, phase).set(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of REJECTIONS."""
        self._rejections[reason].inc()

    def weights_updated(self, version: int, pause: float) -> None:
        """Other weights are in force; steps stood still for so many seconds."""
        self._weights_version.set(version)
        self._weights_pause.observe(pause)

    def reloaded(self, what: str, good: bool) -> None:
        """The files of `what` (one of RELOADS) had changed, and were good or not."""
        self._reloads[what, good].inc()

    def prompt_started(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def tokens_generated(self, count: int) -> None:
        self._generation_tokens.inc(count)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def succeeded(self, finish_reason: str) -> None:
        """One sample ended; `finish_reason` is one of FINISH_REASONS."""
        self._success[finish_reason].inc()

    def sample_ended(self, num_tokens: int) -> None:
        """A sample ended with so many tokens, those that it was resumed with included."""
        self._sample_length.observe(num_tokens)

    def longest_sample(self, num_tokens: int) -> None:
        """Of a request that was answered."""
        self._longest_sample.observe(num_tokens)

    def request_ended(self, timings: SequenceTimings, seconds: float, prompt_tokens: int) -> None:
        """One request was answered, so long after its arrival."""
        self._prompt_length.observe(prompt_tokens)
        self._queue.observe(timings.queue)
        self._prefill.observe(timings.prefill)
        self._decode.observe(timings.decode)
        self._end_to_end.observe(seconds)

    def step(self, message: StepMessage) -> None:
        """The worker computed a step."""
        if message.stats is not None and message.stats.num_tokens:
            self._batch_tokens.observe(message.stats.num_tokens)
            self._batch_sequences.observe(message.stats.num_sequences)
            self._step_duration.observe(message.stats.duration)
            self._step_model_duration.observe(message.stats.model_duration)
            for tenant, nanoseconds in message.stats.tenants:
                self._device_seconds.labels(self._model, tenant).inc(nanoseconds / 1e9)


def _method_labels(method: str, request_streams: bool, response_streams: bool) -> tuple[str, str, str]:
    kind = {
        (False, False): "unary",
        (False, True): "server_stream",
        (True, False): "client_stream",
        (True, True): "bidi_stream",
    }[request_streams, response_streams]
    _, service, name = method.split("/")
    return kind, service, name
