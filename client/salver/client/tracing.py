"""A call is part of the caller's trace, where the caller's program has OpenTelemetry."""

from __future__ import annotations

import sys


def trace_context() -> tuple[tuple[str, str], ...]:
    """The current span as metadata (`traceparent`); nothing without OpenTelemetry.

    The library is not loaded for it: where the program has not, there is no span.
    """
    if "opentelemetry" not in sys.modules:
        return ()
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())
