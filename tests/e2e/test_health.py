"""grpc.health.v1 as probes and gateways use it."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.calls import failure_of
from support.serving import Server

SERVING = health_pb2.HealthCheckResponse.SERVING
NAMES = [
    *("", "readiness", "liveness", "salver.v1.GenerationService"),
    *("salver.v1.EncodingService", "salver.v1.TokenizationService", "salver.v1.ModelService"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_serving(tiny: Server, name: str) -> None:
    assert tiny.health_of(name) == SERVING


def test_the_list_has_every_name(tiny: Server) -> None:
    listed = tiny.health.List(health_pb2.HealthListRequest(), timeout=10).statuses
    assert set(NAMES) <= listed.keys()
    assert {listed[name].status for name in NAMES} == {SERVING}


def test_an_unknown_name_is_not_found(tiny: Server) -> None:
    failure = failure_of(lambda: tiny.health_of("salver.v1.NoSuchService"))
    assert failure.code is grpc.StatusCode.NOT_FOUND


def test_watch_says_the_state_at_once(tiny: Server) -> None:
    watch = tiny.health.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=30)
    assert next(watch).status == SERVING
    watch.cancel()


def test_watch_of_an_unknown_name_stays_open(tiny: Server) -> None:
    """As the health protocol asks: a service may come later."""
    watch = tiny.health.Watch(health_pb2.HealthCheckRequest(service="later"), timeout=30)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_a_saturated_server_stays_serving(tiny: Server) -> None:
    streams = [tiny.stream(f"busy {i}", max_tokens=400, ignore_eos=True) for i in range(64)]
    for _ in range(20):
        assert tiny.health_of() == SERVING
    for stream in streams:
        stream.cancel()
    tiny.wait_idle()
