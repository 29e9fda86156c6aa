"""An error that carries its status, and the status as gRPC sends it.

The rich details are a `google.rpc.Status` in the `grpc-status-details-bin` trailer, as
every gRPC library reads them. Push-back goes out twice: `RetryInfo` for people, the
`grpc-retry-pushback-ms` trailer for gRPC's own retries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from salver.server.engine.errors import (
    EngineError,
    EngineUnavailable,
    RequestAborted,
    RequestDeadlineExceeded,
    RequestOutOfMemory,
)

ERROR_DOMAIN = "salver"
TASK_NOT_SUPPORTED = "TASK_NOT_SUPPORTED"
NUMERICS_MISMATCH = "NUMERICS_MISMATCH"

# How long clients are asked to wait, in seconds. A full queue moves within a step or a few; a
# drained server's clients should find another one now.
RETRY_QUEUE_FULL = 0.5
MAX_RETRY_DEADLINE = 10.0  # a forecast of more load than that is worth nothing by then
RETRY_OUT_OF_MEMORY = 5.0  # the others that share the memory must end first
RETRY_LOADING = 1.0
RETRY_DRAINING = 0.1

_MAX_MESSAGE_CHARACTERS = 1000
_MAX_DETAIL_CHARACTERS = 3000


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path as in the proto (`stopping.stop[1]`) and what is wrong with it."""

    field: str
    description: str


class ApiError(Exception):
    """Ends a call with a status. `retry_after` is in seconds; `reason` goes into ErrorInfo."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        message = (
            message if len(message) <= _MAX_MESSAGE_CHARACTERS else message[:_MAX_MESSAGE_CHARACTERS] + "..."
        )
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def details(self) -> list[Message]:
        """The rich details, as messages of google.rpc."""
        found: list[Message] = []
        if self.violations:
            bad_request = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad_request.field_violations.add(field=violation.field, description=violation.description)
            found.append(bad_request)
        if self.reason is not None:
            found.append(
                error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN, metadata=self.metadata)
            )
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after * 1e9))
            found.append(retry)
        return found


def invalid_argument(violations: Sequence[Violation]) -> ApiError:
    """INVALID_ARGUMENT that names every bad field, in the message and as BadRequest.

    As many as fit the trailers do: clients refuse more than 8 KiB of metadata, and a
    logit_bias can be wrong thousands of times.
    """
    named: list[Violation] = []
    size = 0
    for violation in violations:
        size += len(violation.field) + len(violation.description) + 8
        if named and size > _MAX_DETAIL_CHARACTERS:
            named.append(Violation("", f"and {len(violations) - len(named)} more"))
            break
        named.append(violation)
    message = "; ".join(f"{v.field}: {v.description}".removeprefix(": ") for v in named)
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, message, violations=named)


def shortened(text: str) -> str:
    """What a client sent, fit to be quoted in a message."""
    return text if len(text) <= 80 else text[:80] + "..."


def out_of_range(message: str, **numbers: int) -> ApiError:
    """OUT_OF_RANGE: more than the context or the cache holds. The numbers go out as metadata too."""
    metadata = {name: str(value) for name, value in numbers.items()}
    return ApiError(
        grpc.StatusCode.OUT_OF_RANGE, message, reason="CONTEXT_LENGTH_EXCEEDED", metadata=metadata
    )


def unavailable(message: str, retry_after: float, reason: str) -> ApiError:
    """UNAVAILABLE: loading, draining or restarting. Worth trying again."""
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, retry_after=retry_after, reason=reason)


def loading() -> ApiError:
    return unavailable("the model is still loading", RETRY_LOADING, "LOADING")


def draining() -> ApiError:
    return unavailable("the server is shutting down", RETRY_DRAINING, "DRAINING")


def queue_full(waiting: str) -> ApiError:
    """RESOURCE_EXHAUSTED: nothing is wrong with the request, there are too many."""
    return ApiError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"the queue is full: {waiting} are waiting",
        reason="QUEUE_FULL",
        retry_after=RETRY_QUEUE_FULL,
    )


def deadline_too_short(seconds: float, left: float) -> ApiError:
    """RESOURCE_EXHAUSTED: with what is ahead of it, the request would take `seconds`, and has `left`.

    After as much time as it lacks, the load that there is now would let it through.
    """
    return ApiError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"too much is waiting: the answer would take about {seconds:.1f} s, the deadline is in {left:.1f} s",
        reason="DEADLINE_TOO_SHORT",
        retry_after=min(MAX_RETRY_DEADLINE, max(RETRY_QUEUE_FULL, seconds - left)),
    )


def task_not_supported(message: str, **metadata: str) -> ApiError:
    """FAILED_PRECONDITION: this checkpoint cannot do that."""
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION, message, reason=TASK_NOT_SUPPORTED, metadata=metadata
    )


def internal(request_id: str) -> ApiError:
    """INTERNAL: a bug. What happened is in the log only, under the request id."""
    return ApiError(
        grpc.StatusCode.INTERNAL, f"internal error; the server's log has more under request id {request_id}"
    )


def from_engine_error(error: EngineError, request_id: str) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, RequestDeadlineExceeded):
        return ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, str(error) or "the deadline has passed")
    if isinstance(error, RequestOutOfMemory):
        return ApiError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the request does not fit in the server's memory: {error}",
            reason="OUT_OF_MEMORY",
            retry_after=RETRY_OUT_OF_MEMORY,
        )
    if isinstance(error, RequestAborted):
        return ApiError(grpc.StatusCode.ABORTED, str(error), reason=error.reason)
    if isinstance(error, EngineUnavailable):
        message = str(error) or "the engine is restarting"
        return unavailable(message, error.retry_after, "ENGINE_UNAVAILABLE")
    return internal(request_id)


def trailing_metadata(error: ApiError, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of a call that ends with `error`."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    details = error.details()
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    for detail in details:
        status.details.add().Pack(detail)
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if error.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))))
    return tuple(trailers)
