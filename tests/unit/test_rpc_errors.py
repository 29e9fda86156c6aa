"""Errors as they go over the wire: status, rich details, push-back."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from salver.server.engine.errors import (
    EngineError,
    EngineUnavailable,
    RequestDeadlineExceeded,
    RequestFailed,
)
from salver.server.rpc.errors import (
    ApiError,
    Violation,
    draining,
    from_engine_error,
    internal,
    invalid_argument,
    out_of_range,
    queue_full,
    task_not_supported,
    trailing_metadata,
)


def status_of(error: ApiError, request_id: str = "") -> tuple[status_pb2.Status, dict[str, str | bytes]]:
    trailers = dict(trailing_metadata(error, request_id))
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    return status_pb2.Status.FromString(details), trailers


def test_every_violation_with_its_path() -> None:
    error = invalid_argument([Violation("a.b", "is bad"), Violation("c[1]", "too")])
    status, trailers = status_of(error, "r1")
    assert (status.code, status.message) == (3, "a.b: is bad; c[1]: too")
    bad, info = error_details_pb2.BadRequest(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(bad) and status.details[1].Unpack(info)
    assert [(v.field, v.description) for v in bad.field_violations] == [("a.b", "is bad"), ("c[1]", "too")]
    assert info.request_id == "r1"
    assert "grpc-retry-pushback-ms" not in trailers


def test_thousands_of_violations_still_fit_the_trailers() -> None:
    error = invalid_argument([Violation(f"sampling.logit_bias[{i}]", "x" * 30) for i in range(5000)])
    trailers = trailing_metadata(error, "r")
    assert sum(len(name) + len(value) for name, value in trailers) < 7000
    assert "more" in error.violations[-1].description


def test_push_back_goes_out_twice() -> None:
    for error in (queue_full("3 requests"), draining()):
        status, trailers = status_of(error)
        retry = next(
            r for d in status.details if d.Is((r := error_details_pb2.RetryInfo()).DESCRIPTOR) and d.Unpack(r)
        )
        assert error.retry_after is not None
        assert retry.retry_delay.ToTimedelta().total_seconds() == pytest.approx(error.retry_after)
        assert trailers["grpc-retry-pushback-ms"] == str(round(error.retry_after * 1000))


def test_reasons_and_numbers() -> None:
    status, _ = status_of(task_not_supported("no chat"))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("TASK_NOT_SUPPORTED", "salver")
    status, _ = status_of(out_of_range("too long", prompt_tokens=7))
    assert status.details[0].Unpack(info)
    assert info.metadata == {"prompt_tokens": "7"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestDeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (EngineUnavailable("restarting", 2.5), grpc.StatusCode.UNAVAILABLE),
        (RequestFailed("NaN in row 7 of secret"), grpc.StatusCode.INTERNAL),
        (EngineError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_of_the_engine(error: EngineError, code: grpc.StatusCode) -> None:
    mapped = from_engine_error(error, "r9")
    assert mapped.code is code
    assert (mapped.retry_after == 2.5) == isinstance(error, EngineUnavailable)
    if code is grpc.StatusCode.INTERNAL:
        assert "secret" not in mapped.message and "r9" in mapped.message


def test_messages_are_bounded() -> None:
    assert len(ApiError(grpc.StatusCode.NOT_FOUND, "x" * 10**6).message) < 1100
    assert "r1" in internal("r1").message
