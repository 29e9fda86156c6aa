"""The flags of `salver serve` about what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from salver.server.flags import flag
from salver.server.metrics_compat import FLAVORS

GROUP = "Observability"
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """Logs, traces, and metrics under other names."""

    log_format: str = flag("text", GROUP, "key=value pairs, or one JSON object a line", choices=LOG_FORMATS)
    log_requests: bool = flag(
        False, GROUP, "log each call when it has ended: method, request id, tenant, status, seconds"
    )
    metrics_compat: str | None = flag(
        None, GROUP, "the metrics also under the names of another server, for boards and autoscalers made "
        "for it", choices=FLAVORS, shown="ours alone",
    )  # fmt: skip
    otlp_endpoint: str | None = flag(
        None, GROUP, "send OpenTelemetry traces there by OTLP over gRPC, as http://collector:4317 (https:// "
        "for TLS); needs the extra salver[otel]", metavar="URL", shown="no traces",
    )  # fmt: skip
