"""OpenTelemetry traces: a span for each call, and under it the queue, prefill and decode of its requests.

The parent is what the caller's `traceparent` metadata says (W3C Trace Context). A span tells
method, status, request id, tenant and counts of tokens, never a prompt or an answer. Spans are made
when the call has ended, from the times noted meanwhile, so that an answer never waits for them; they
leave in batches by a thread of OpenTelemetry's. The libraries are loaded only where traces are wanted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import grpc

from salver.server.rpc.calls import Call, RequestPhases

_HEADERS = ("traceparent", "tracestate")
# Of these one says that the server failed; the others are the caller's affair.
_SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class TracingUnavailable(Exception):
    """Traces are wanted and cannot be had; the message names flag and remedy."""


class Tracing:
    """Sends the traces of one server to `endpoint`."""

    def __init__(self, endpoint: str, model: str, version: str) -> None:
        """Raises TracingUnavailable."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingUnavailable(
                f"--otlp-endpoint needs OpenTelemetry: pip install 'salver[otel]' ({error})"
            ) from error
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
            raise TracingUnavailable(f"--otlp-endpoint {endpoint}: write it as http://collector:4317")
        self._trace: Any = trace
        self._propagator = TraceContextTextMapPropagator()
        # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER are honoured as everywhere.
        resource = Resource.create({"service.version": version, "salver.model": model})
        if resource.attributes.get("service.name", "unknown_service").startswith("unknown_service"):  # type: ignore[union-attr]
            resource = resource.merge(Resource({"service.name": "salver"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http:"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("salver.server")

    def ended(self, call: Call, code: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """A call has ended with this status."""
        headers = {name: str(value) for name, value in metadata if name in _HEADERS}
        # Times of spans are of the epoch; ours are of the monotonic clock.
        offset = time.time() - time.monotonic()

        def at(moment: float) -> int:
            return int((moment + offset) * 1e9)

        service, _, method = call.method.lstrip("/").partition("/")
        span = self._tracer.start_span(
            call.method.lstrip("/"),
            context=self._propagator.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=at(call.begun),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "rpc.grpc.status_code": int(grpc.StatusCode[code].value[0]),
                "salver.request_id": call.request_id,
                "salver.tenant": call.tenant,
            },
        )
        if code in _SERVER_FAULTS:
            span.set_status(self._trace.StatusCode.ERROR, code)
        now = time.monotonic()
        context = self._trace.set_span_in_context(span)
        for request in call.requests:
            for name, begin, end in _phases(request, now):
                child = self._tracer.start_span(
                    name, context=context, start_time=at(begin),
                    attributes={
                        "gen_ai.usage.input_tokens": request.prompt_tokens,
                        "gen_ai.usage.output_tokens": request.output_tokens,
                    },
                )  # fmt: skip
                child.end(at(end))
        span.end(at(now))

    def close(self) -> None:
        """Sends what is left, for at most a few seconds."""
        self._provider.force_flush(3000)
        self._provider.shutdown()


def _phases(request: RequestPhases, now: float) -> list[tuple[str, float, float]]:
    """Name, begin and end of each phase that the request came to; the last one may have been cut short."""
    if request.started is None:
        return [("queue", request.arrival, now)]
    phases = [("queue", request.arrival, request.started)]
    if request.first_token is None:
        return [*phases, ("prefill", request.started, now)]
    phases.append(("prefill", request.started, request.first_token))
    if request.last_token is not None and request.last_token > request.first_token:
        phases.append(("decode", request.first_token, request.last_token))
    return phases
