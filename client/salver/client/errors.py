"""Failed calls as exceptions, with the details that the server sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"
# A stream that a proxy or a dying server has reset comes with a code that gRPC makes up, and with no
# status of the server. It is a lost connection like others. (A reset with "cancel" is not among them.)
_RESETS = ("RST_STREAM with error code 0", "RST_STREAM with error code 2", "Stream removed")
_RESET_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request (`sampling.temperature`) and what is wrong with it."""

    field: str
    description: str


class SalverError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC status code.
        message: what the server (or gRPC) says.
        violations: every bad field, for INVALID_ARGUMENT.
        retry_after: seconds after which to try again, where the server says so.
        reason: a constant like TASK_NOT_SUPPORTED, where there is one.
        may_retry: False where the server asks not to try again.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
        reason: str = "",
        may_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after = retry_after
        self.reason = reason
        self.may_retry = may_retry

    def __str__(self) -> str:
        lines = [f"{self.code.name}: {self.message}"]
        lines += [
            f"  {v.field}: {v.description}" for v in self.violations if v.description not in self.message
        ]
        return "\n".join(lines)


class InvalidArgument(SalverError):
    """A field of the request is bad; see `violations`."""


class OutOfRange(SalverError):
    """More tokens than the context or the cache holds."""


class NotFound(SalverError):
    """No such model or adapter."""


class FailedPrecondition(SalverError):
    """Not with this checkpoint or in this state; see `reason`."""


class ResourceExhausted(SalverError):
    """The queue is full, or a message too large; see `retry_after`."""


class Unavailable(SalverError):
    """Loading, restarting, draining, or not there."""


class DeadlineExceeded(SalverError):
    """The deadline passed first."""


class Cancelled(SalverError):
    """The call was cancelled."""


class Aborted(SalverError):
    """Who runs the server ended the call, as by unloading its adapter; see `reason`."""


class Unauthenticated(SalverError):
    """No valid credentials."""


class PermissionDenied(SalverError):
    """Not allowed."""


class DataLoss(SalverError):
    """A resumed stream does not go on where it was cut; what came before is whole."""


class Internal(SalverError):
    """A bug in the server; its log has the trace under the request id."""


_KINDS: dict[grpc.StatusCode, type[SalverError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.INTERNAL: Internal,
}


def from_rpc_error(error: Any) -> SalverError:
    """A SalverError from a `grpc.RpcError` of either kind of channel."""
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    reason = ""
    may_retry = True
    trailers = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == _PUSHBACK:  # as gRPC reads it: what is no number, or negative, is "do not"
            may_retry = value.isdecimal()
            retry_after = int(value) / 1000 if may_retry else None
    for detail in _details(trailers):
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after = delay.seconds + delay.nanos / 1e9
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
    code = error.code()
    message = error.details() or ""
    if code in _RESET_CODES and any(text in message for text in _RESETS):
        code = grpc.StatusCode.UNAVAILABLE
    return _KINDS.get(code, SalverError)(
        code,
        message,
        violations=tuple(violations),
        retry_after=retry_after,
        reason=reason,
        may_retry=may_retry,
    )


def _details(metadata: Any) -> list[Any]:
    for key, value in metadata:
        if key == _DETAILS:
            return list(status_pb2.Status.FromString(value).details)
    return []
