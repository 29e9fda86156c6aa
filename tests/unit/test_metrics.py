"""The exposition: every series from the start, truthful numbers, bounded labels."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from salver.server.admission import Admission
from salver.server.engine.request import (
    EngineRequest,
    SamplingParams,
    SequenceOutput,
    SequenceTimings,
    StepMessage,
    StepStats,
    StoppingParams,
)
from salver.server.metrics import FINISH_REASONS, REJECTIONS, Metrics
from salver.server.rpc.submission import ObservedSink

METHODS = {"/s.v1.S/Unary": (False, False), "/s.v1.S/Stream": (False, True)}


def make() -> Metrics:
    return Metrics("m", methods=METHODS, codes=("OK", "CANCELLED"), build={"version": "1"})


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [v for (n, of), v in samples(metrics).items() if n == name and labels.items() <= dict(of).items()]
    assert found, (name, labels)
    return sum(found)


@dataclass
class FakePage:
    updated: float = 0.0
    num_running: int = 3
    num_waiting: int = 2
    kv_blocks_used: int = 5
    kv_blocks_total: int = 20
    preemptions: int = 7
    prefix_queries: int = 100
    prefix_hits: int = 40
    draft_tokens: int = 50
    accepted_draft_tokens: int = 30
    gpu_memory_used: int = 0
    gpu_memory_total: int = 0
    gpu_utilization: int = 0


class FakeWorker:
    def __init__(self) -> None:
        self.page = FakePage(updated=time.monotonic() - 3)
        self.restarts = 1


class CountingSink:
    """Takes at most `limit` tokens, as a stream does after a stop string."""

    def __init__(self, limit: int = 1000) -> None:
        self.completion_tokens = 0
        self.limit = limit

    def put(self, output: SequenceOutput) -> None:
        self.completion_tokens = min(self.limit, self.completion_tokens + len(output.token_ids))

    def started(self, seconds: float) -> None: ...

    def fail(self, error: Exception) -> None: ...


def test_all_series_are_there_from_the_start() -> None:
    metrics = make()
    for reason in FINISH_REASONS:
        assert value(metrics, "salver_request_success_total", model="m", finish_reason=reason) == 0
    for reason in REJECTIONS:
        assert value(metrics, "salver_rejections_total", reason=reason) == 0
    for code in ("OK", "CANCELLED"):
        assert value(metrics, "grpc_server_handled_total", grpc_method="Unary", grpc_code=code) == 0
    assert value(metrics, "grpc_server_started_total", grpc_type="server_stream") == 0
    assert value(metrics, "salver_num_requests_running") == 0
    assert value(metrics, "salver_build_info", version="1") == 1
    assert not any(name.endswith("_created") for name, _ in samples(metrics))


def test_gauges_are_read_from_the_page_when_asked() -> None:
    metrics = make()
    worker = FakeWorker()
    metrics.worker.worker = worker
    assert value(metrics, "salver_num_requests_running") == 3
    assert value(metrics, "salver_kv_cache_usage_ratio") == 0.25
    worker.page.num_running, worker.page.kv_blocks_used = 0, 0
    assert value(metrics, "salver_num_requests_running") == 0
    assert value(metrics, "salver_kv_cache_usage_ratio") == 0
    assert value(metrics, "salver_num_requests_waiting") == 2
    assert value(metrics, "salver_preemptions_total") == 7
    assert value(metrics, "salver_prefix_cache_queries_total") == 100
    assert value(metrics, "salver_prefix_cache_hits_total") == 40
    assert value(metrics, "salver_draft_tokens_total") == 50
    assert value(metrics, "salver_accepted_draft_tokens_total") == 30
    assert value(metrics, "salver_worker_restarts_total") == 1
    assert 3 <= value(metrics, "salver_worker_page_age_seconds") < 60


def test_calls_and_unknown_methods() -> None:
    metrics = make()
    metrics.rpc_started("/s.v1.S/Stream")
    metrics.rpc_handled("/s.v1.S/Stream", "CANCELLED", 0.02)
    before = len(samples(metrics))
    metrics.rpc_started("/made.up/Method")  # labels stay bounded, whatever clients call
    metrics.rpc_handled("/made.up/Method", "OK", 1)
    assert len(samples(metrics)) == before
    assert value(metrics, "grpc_server_started_total", grpc_method="Stream") == 1
    assert value(metrics, "grpc_server_handled_total", grpc_method="Stream", grpc_code="CANCELLED") == 1
    assert value(metrics, "grpc_server_handling_seconds_count", grpc_method="Stream") == 1


def request(prompt: int = 5, samples: int = 1) -> EngineRequest:
    return EngineRequest(
        1, tuple(range(prompt)), SamplingParams(), StoppingParams(max_tokens=9),
        sample_indices=tuple(range(samples)), outputs=((),) * samples, arrival=time.monotonic(),
    )  # fmt: skip


def test_tokens_and_gaps_of_each_sample() -> None:
    metrics = make()
    permit = Admission(9, 999, metrics.rejected).admit()
    sink = ObservedSink(request(samples=2), CountingSink(), metrics, permit)
    sink.started(0.1)
    sink.started(0.1)  # a restarted worker computes it again
    for sample, tokens in ((0, [1]), (1, [1]), (0, [2]), (1, [2, 3])):
        sink.put(SequenceOutput(1, sample, tokens))
    assert value(metrics, "salver_prompt_tokens_total") == 5
    assert value(metrics, "salver_generation_tokens_total") == 5
    assert value(metrics, "salver_time_to_first_token_seconds_count") == 2
    assert value(metrics, "salver_inter_token_latency_seconds_count") == 3


def test_tokens_that_no_reply_has_are_not_counted() -> None:
    metrics = make()
    sink = ObservedSink(request(), CountingSink(limit=2), metrics, Admission(9, 9, metrics.rejected).admit())
    for token in range(4):
        sink.put(SequenceOutput(1, 0, [token]))
    assert value(metrics, "salver_generation_tokens_total") == 2


def test_steps_and_requests() -> None:
    metrics = make()
    shares = (("", 5_000_000), ("a", 15_000_000))
    metrics.step(StepMessage([], [], StepStats(33, 3, 0.02, 0.01, tenants=shares)))
    metrics.step(StepMessage([], [], None))
    metrics.request_ended(SequenceTimings(queue=0.1, prefill=0.2, decode=0.3), 0.7, 11)
    metrics.succeeded("stop")
    assert value(metrics, "salver_batch_tokens_sum") == 33
    assert value(metrics, "salver_batch_sequences_sum") == 3
    assert value(metrics, "salver_request_prompt_tokens_sum") == 11
    assert value(metrics, "salver_step_duration_seconds_count") == 1
    for tenant, nanoseconds in shares:
        assert value(metrics, "salver_device_seconds_total", tenant=tenant) == nanoseconds / 1e9
    for name, seconds in (("queue", 0.1), ("prefill", 0.2), ("decode", 0.3)):
        assert value(metrics, f"salver_request_{name}_time_seconds_sum") == seconds
    assert value(metrics, "salver_e2e_request_latency_seconds_sum") == 0.7
    assert value(metrics, "salver_request_success_total", finish_reason="stop") == 1
