"""What a server tells of itself: traces, metrics under other names, logs."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from opentelemetry import context, trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import generate_latest
from support.certificates import token_file
from support.fake_service import failure, request, run, service, until

from salver.client import AsyncClient, Client, ConnectionOptions
from salver.server.config import parse_config
from salver.server.engine.request import SequenceTimings
from salver.server.log import log_event, set_up_logging
from salver.server.metrics import Metrics
from salver.server.metrics_compat import FLAVORS, exposed
from salver.v1 import tokenization_pb2

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver on a port: the spans that came."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.came = threading.Condition()
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.endpoint = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Export(self, request: Any, context: Any) -> Any:
        with self.came:
            for resource in request.resource_spans:
                self.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self.came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Any:
        (span,) = (span for span in self.spans if span.name == name)
        return span


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.server.stop(0)


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_call_is_a_span_with_its_phases_below(sink: Sink, tmp_path: Path) -> None:
    """In the caller's trace; the phases follow one another inside it; no text of the request is there."""
    tokens = token_file(tmp_path / "tokens.toml", ("one", "alice"))
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("authorization", "Bearer one"))

    async def test() -> None:
        async with service(otlp_endpoint=sink.endpoint, tokens=tokens) as served:
            asked = request("hush-hush")
            asked.request_id = "r-1"
            await served.generation.Generate(asked, metadata=metadata)
            tokenize = tokenization_pb2.TokenizeRequest(text="hush-hush")
            code, _ = await failure(served.tokenization.Tokenize(tokenize, metadata=metadata[:1]))
            assert code is grpc.StatusCode.UNAUTHENTICATED

    run(test)  # the end sends what is left
    assert sink.resources[0]["service.name"] == "salver"
    call = sink.named("salver.v1.GenerationService/Generate")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
    said = attributes(call)
    assert (said["rpc.method"], said["rpc.grpc.status_code"]) == ("Generate", 0)
    assert (said["salver.request_id"], said["salver.tenant"]) == ("r-1", "alice")
    phases = [sink.named(name) for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert (phase.trace_id, phase.parent_span_id) == (call.trace_id, call.span_id)
        assert attributes(phase) == {"gen_ai.usage.input_tokens": 9, "gen_ai.usage.output_tokens": 6}
    moments = [call.start_time_unix_nano]
    for phase in phases:
        moments += [phase.start_time_unix_nano, phase.end_time_unix_nano]
    moments.append(call.end_time_unix_nano)
    assert all(later >= earlier - 1000 for earlier, later in itertools.pairwise(moments)), moments
    refused = sink.named("salver.v1.TokenizationService/Tokenize")
    assert attributes(refused)["rpc.grpc.status_code"] == 16 and refused.trace_id == call.trace_id
    assert len(sink.spans) == 5
    assert b"hush" not in b"".join(span.SerializeToString() for span in sink.spans)


def test_a_call_that_was_cut_shows_how_far_it_came(sink: Sink) -> None:
    async def test() -> None:
        async with service(otlp_endpoint=sink.endpoint) as served:
            served.engine.hold.clear()
            with pytest.raises(grpc.aio.AioRpcError):
                await served.generation.Generate(request(), timeout=0.2)
            await until(lambda: served.engine.aborted)  # the server has seen the end of it, too
            served.engine.hold.set()

    run(test)
    assert {span.name for span in sink.spans} == {"salver.v1.GenerationService/Generate", "queue"}
    assert sink.named("salver.v1.GenerationService/Generate").status.code == 2


def test_the_client_sends_the_callers_span() -> None:
    """Both clients, without being told to; and nothing where there is no span."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")

    async def test() -> None:
        async with service() as served:
            seen: list[str] = []
            enter = served.rpc._calls._enter

            def note(method: str, metadata: Any) -> None:
                seen.append(dict(metadata).get("traceparent", ""))
                enter(method, metadata)

            served.rpc._calls._enter = note
            span = tracer.start_span("caller")
            attached = context.attach(trace.set_span_in_context(span))
            async with AsyncClient(served.address) as client:
                await client.generate("abc", max_tokens=1)
            with Client(served.address, ConnectionOptions()) as blocking:
                await asyncio.to_thread(blocking.server_info)
                context.detach(attached)
                await asyncio.to_thread(blocking.server_info)
            trace_id = f"{span.get_span_context().trace_id:032x}"
            assert [trace_id in header for header in seen] == [True, True, False]

    run(test)


def test_traces_that_cannot_be_sent_are_said_at_the_start() -> None:
    from salver.server.rpc.tracing import Tracing, TracingUnavailable

    for wrong in ("collector:4317", "http://", "ftp://a:1"):
        with pytest.raises(TracingUnavailable, match="--otlp-endpoint"):
            Tracing(wrong, "m", "1")


def samples(registry: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in registry.collect()
        for s in family.samples
    }


# What vLLM's own board asks for (examples/observability/prometheus_grafana/grafana.json), and what the KEDA
# example of its production stack and the inference extension of the Gateway API do.
VLLM_BOARD = (
    *("e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "prompt_tokens_total"),
    *("e2e_request_latency_seconds_count", "generation_tokens_total", "inter_token_latency_seconds_bucket"),
    *("inter_token_latency_seconds_sum", "inter_token_latency_seconds_count", "num_requests_running"),
    *("num_requests_waiting", "time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum"),
    *("time_to_first_token_seconds_count", "kv_cache_usage_perc", "request_prompt_tokens_bucket"),
    *("request_generation_tokens_bucket", "request_success_total", "request_queue_time_seconds_sum"),
    *("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"),
    "request_max_num_generation_tokens_sum",
)
# What text-embeddings-inference counts, whose counters have no _total.
TEI_SERIES = (
    *("te_request_success", "te_request_duration_bucket", "te_request_queue_duration_bucket"),
    *("te_request_inference_duration_bucket", "te_batch_next_size_sum", "te_batch_next_tokens_sum"),
    "te_queue_size",
)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_same_values_under_other_names(flavor: str) -> None:
    metrics = Metrics("m")
    metrics.first_token(0.2)
    metrics.tokens_generated(7)
    metrics.succeeded("length")
    metrics.request_ended(SequenceTimings(), 0.3, 5)
    ours, both = samples(metrics.registry), samples(exposed(metrics.registry, flavor))
    process = {key for key in ours if key[0].startswith("process_")}
    assert {k: v for k, v in both.items() if k in ours.keys() - process} == {
        k: v for k, v in ours.items() if k not in process
    }
    theirs = {name: value for (name, _), value in both.items() if not name.startswith(("salver", "process"))}
    if flavor == "vllm":
        vllm = frozenset({("model_name", "m"), ("engine", "0")})
        assert both["vllm:generation_tokens_total", vllm] == 7
        assert both["vllm:time_to_first_token_seconds_sum", vllm] == 0.2
        ended = frozenset({*vllm, ("finished_reason", "length")})
        assert both["vllm:request_success_total", ended] == 1
        assert {f"vllm:{name}" for name in VLLM_BOARD} | {
            "vllm:iteration_tokens_total_bucket"
        } <= theirs.keys()
        assert both["vllm:request_prompt_tokens_sum", vllm] == 5
    else:
        assert set(TEI_SERIES) <= theirs.keys() and "te_request_success_total" not in theirs
        ended = frozenset({("model", "m"), ("finish_reason", "length")})
        assert both["te_request_success", ended] == 1
    text = generate_latest(exposed(metrics.registry, flavor)).decode()
    assert text.count("# TYPE vllm:generation_tokens_total counter") == (flavor == "vllm")
    assert samples(exposed(metrics.registry, None)).keys() == ours.keys()


def test_logs_as_json() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        set_up_logging("info", stream, "json")
        try:
            raise ValueError('a "quote"\nand a line')
        except ValueError as error:
            log_event(
                logging.getLogger("salver.x"), logging.ERROR, "bad", exc_info=error, request_id="r", n=3
            )
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    (line,) = stream.getvalue().splitlines()
    said = json.loads(line)
    assert (said["level"], said["logger"], said["msg"]) == ("error", "salver.x", "bad")
    assert (said["request_id"], said["n"]) == ("r", 3) and "ValueError" in said["traceback"]
    assert parse_config(["m", "--log-format", "json"], {}).log_format == "json"


def test_calls_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """One line for each, of ours and not of probes, found by its request id."""

    async def test() -> None:
        async with service(log_requests=True) as served:
            asked = request("hush-hush")
            asked.request_id = "r-7"
            await served.generation.Generate(asked)
            await failure(served.generation.Generate(request(max_tokens=100000)))
            await served.health.Check(health_pb2.HealthCheckRequest())

    with caplog.at_level(logging.INFO, "salver.rpc"):
        run(test)
    calls = [record.salver_fields for record in caplog.records if record.getMessage() == "call"]  # type: ignore[attr-defined]
    assert (calls[0]["request_id"], calls[0]["code"]) == ("r-7", "OK")
    assert (calls[0]["prompt_tokens"], calls[0]["output_tokens"]) == (9, 6)
    assert len(calls) == 2 and calls[1]["code"] == "OUT_OF_RANGE"
    assert "hush" not in caplog.text
