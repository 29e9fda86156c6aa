"""Between the services and the engine: what is waiting, and what the metrics see of it.

`Submissions` looks like the engine to a `GenerationStream`; each request's sink is wrapped
by one that counts what comes back and gives the permit back when the request starts.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from salver.server.admission import Permit
from salver.server.engine.errors import EngineError, EngineUnavailable
from salver.server.engine.process import OutputSink
from salver.server.engine.request import EngineRequest, SequenceOutput
from salver.server.metrics import Metrics
from salver.server.rpc.calls import RequestPhases, current_call
from salver.server.rpc.served import Engine
from salver.server.rpc.tenancy import current_tenant
from salver.server.tenants import ANYBODY, Tenant

# Engine request ids: unique for the life of the process, whichever service draws them.
next_request_id = itertools.count(1).__next__


class Submissions:
    """The engine, for the requests of one call that holds `permit`. They are marked as their tenant's."""

    def __init__(self, engine: Engine, metrics: Metrics, permit: Permit) -> None:
        self._engine = engine
        self._metrics = metrics
        self._permit = permit
        self._tenant = current_tenant()
        self._call = current_call()

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        """Submits; raises EngineUnavailable."""
        tenant = self._tenant
        request = replace(
            request, tenant=tenant.name, weight=tenant.weight, cache_salt=tenant.salted(request.cache_salt)
        )
        phases = RequestPhases(request.arrival, request.num_input_tokens)
        if self._call is not None:
            self._call.requests.append(phases)
            self._call.engine_requests.append(request.request_id)
        observed = ObservedSink(request, sink, self._metrics, self._permit, tenant, phases)
        try:
            self._engine.submit(request, observed)
            self._permit.submitted(request)
        except EngineUnavailable:
            self._metrics.rejected("unavailable")
            raise

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        self._permit.forecast.ended(request_id, sample_index)
        self._engine.abort(request_id, sample_index)


class ObservedSink:
    """Passes on what the engine puts into `sink`, and tells the metrics."""

    __slots__ = (
        "_last_tokens",
        "_metrics",
        "_permit",
        "_phases",
        "_request",
        "_seen_tokens",
        "_sink",
        "_started",
        "_tenant",
    )

    def __init__(
        self,
        request: EngineRequest,
        sink: OutputSink,
        metrics: Metrics,
        permit: Permit,
        tenant: Tenant = ANYBODY,
        phases: RequestPhases | None = None,
    ) -> None:
        self._request = request
        self._sink = sink
        self._metrics = metrics
        self._permit = permit
        self._tenant = tenant
        self._phases = phases or RequestPhases(request.arrival, request.num_input_tokens)
        self._started = False
        self._seen_tokens = getattr(sink, "completion_tokens", 0)
        self._last_tokens: dict[int, float] = {}

    def started(self, seconds: float) -> None:
        """Comes again when a restarted worker computes the request anew; only the first time counts."""
        if not self._started:
            self._started = True
            self._phases.started = self._phases.arrival + seconds
            self._permit.started(self._request.num_input_tokens, self._request.num_places)
            self._metrics.prompt_started(self._request.num_input_tokens)
            self._permit.forecast.started(self._request.request_id)
            self._tenant.allowance.take(self._request.num_input_tokens)
        self._sink.started(seconds)

    def put(self, output: SequenceOutput) -> None:
        self._permit.forecast.took(output)
        self._sink.put(output)
        if output.finish_reason is not None and not output.token_ids:
            self._phases.last_token = time.monotonic()  # of what samples nothing, the end
            self._phases.first_token = self._phases.first_token or self._phases.last_token
        # What the stream has taken: tokens after a stop string are in no reply and not counted.
        taken = getattr(self._sink, "completion_tokens", 0) - self._seen_tokens
        if taken <= 0:
            return
        self._seen_tokens += taken
        self._metrics.tokens_generated(taken)
        self._tenant.allowance.take(taken)
        now = time.monotonic()
        phases = self._phases
        phases.first_token, phases.last_token = phases.first_token or now, now
        phases.output_tokens += taken
        last = self._last_tokens.get(output.sample_index)
        if last is None:
            self._metrics.first_token(now - self._request.arrival)
            last, gaps = now, taken - 1
        else:
            gaps = taken
        if self._request.beams is not None:
            gaps = 0  # the answers of a search come whole: there was no gap to wait
        for _ in range(gaps):  # several tokens of one output share its gap
            self._metrics.next_token((now - last) / gaps)
        self._last_tokens[output.sample_index] = now

    def fail(self, error: EngineError) -> None:
        self._sink.fail(error)
