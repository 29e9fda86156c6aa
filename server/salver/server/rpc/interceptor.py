"""Around every call: the gate, one mapping of exceptions to status, the request id, the metrics.

Requests are parsed here and not by gRPC, so that a malformed one is INVALID_ARGUMENT
with our details like every other bad request, and so that the request id is known to
whatever happens next. A call that ends by an exception ends with a status of
`salver.server.rpc.errors`; what is not expected there is INTERNAL, opaque to the
client, with its traceback in the log under the request id.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from salver.server.engine.errors import EngineError
from salver.server.log import log_event
from salver.server.metrics import Metrics
from salver.server.rpc.calls import Call, enter_call
from salver.server.rpc.errors import (
    ApiError,
    Violation,
    from_engine_error,
    internal,
    invalid_argument,
    trailing_metadata,
)

_log = logging.getLogger("salver.rpc")
OUR_PREFIX = "/salver.v1."


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of the server.

    `gate` is asked before each call of our own services and raises ApiError while the server
    is loading or draining; health and reflection pass always. `enter` is asked before it, of every
    call, with its method and metadata, and raises ApiError for callers who may not. `ended` is told
    of each call, its status and its metadata.
    """

    def __init__(
        self,
        metrics: Metrics,
        gate: Callable[[], Awaitable[None]],
        enter: Callable[[str, Any], None] = lambda method, metadata: None,
        ended: Callable[[Call, str, Any], None] = lambda call, code, metadata: None,
    ) -> None:
        self._metrics = metrics
        self._gate = gate
        self._enter = enter
        self._ended = ended
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Calls of our own services that have not ended."""
        return len(self._running)

    async def wait_idle(self) -> None:
        """Returns when no call of our own services is running."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler  # an unknown method: gRPC answers UNIMPLEMENTED
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._around_stream(method, handler.stream_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        # As if requests streamed: grpc.aio never answers a call for one request that ends without it.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrapped = self._around(method, behavior, handler.request_deserializer)
        return make(wrapped, response_serializer=handler.response_serializer)

    def _around(
        self, method: str, behavior: Callable[..., Any], deserialize: Callable[[bytes], Any]
    ) -> Callable[..., Awaitable[Any]]:
        async def call(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            payload = await anext(payloads, None)
            return await self._run(method, context, lambda: _deserialized(payload, deserialize), behavior)

        return call

    def _around_stream(
        self, method: str, behavior: Callable[..., Any], deserialize: Callable[[bytes], Any]
    ) -> Callable[..., Awaitable[Any]]:
        async def call(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            async def forward(requests: Any, context: grpc.aio.ServicerContext) -> None:
                async for response in behavior(requests, context):
                    await context.write(response)

            requests = (_parsed(lambda: deserialize(payload)) async for payload in payloads)  # noqa: B023
            return await self._run(method, context, lambda: requests, forward)

        return call

    async def _run(
        self,
        method: str,
        context: grpc.aio.ServicerContext,
        parse: Callable[[], Any],
        behavior: Callable[..., Awaitable[Any]],
    ) -> Any:
        current = Call(method, peer=context.peer())
        enter_call(current)
        metadata = context.invocation_metadata() or ()
        ours = method.startswith(OUR_PREFIX)
        task = asyncio.current_task()
        assert task is not None
        self._metrics.rpc_started(method)
        request_id = ""
        code = grpc.StatusCode.OK
        if ours:
            self._running.add(task)
            self._idle.clear()
        try:
            try:
                self._enter(method, metadata)
                if ours:
                    await self._gate()
                request = _parsed(parse)
                request_id = current.request_id = _request_id(request)
                return await behavior(request, context)
            except ApiError as error:
                failure = error
            except EngineError as error:
                failure = from_engine_error(error, request_id)
                if failure.code is grpc.StatusCode.INTERNAL:
                    log_event(
                        _log, logging.ERROR, "request failed",
                        method=method, request_id=request_id, reason=str(error),
                    )  # fmt: skip
            except (grpc.aio.AbortError, grpc.aio.InternalError, asyncio.CancelledError):
                raise
            except Exception as error:
                failure = internal(request_id)
                log_event(
                    _log, logging.ERROR, "unexpected error",
                    exc_info=error, method=method, request_id=request_id,
                )  # fmt: skip
            # Not the message: it may quote what the client sent.
            log_event(
                _log, logging.DEBUG, "refused", method=method, request_id=request_id,
                code=failure.code.name, reason=failure.reason or "",
                fields=" ".join(violation.field for violation in failure.violations),
            )  # fmt: skip
            code = failure.code
            await context.abort(code, failure.message, trailing_metadata(failure, request_id))
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            # The client is gone, or its deadline has passed: gRPC cancels the call for both. What is
            # written just before fails.
            remaining = context.time_remaining()
            expired = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from error
        except grpc.aio.AbortError:
            if code is grpc.StatusCode.OK:
                code = _code_of(context)
            raise
        finally:
            if ours:
                self._running.discard(task)
                if not self._running:
                    self._idle.set()
            self._metrics.rpc_handled(method, code.name, time.monotonic() - current.begun)
            self._ended(current, code.name, metadata)


def _deserialized(payload: bytes | None, deserialize: Callable[[bytes], Any]) -> Any:
    if payload is None:
        raise invalid_argument([Violation("", "the call ended before its message was complete")])
    return deserialize(payload)


def _parsed(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except DecodeError as error:
        raise invalid_argument(
            [Violation("", "the message cannot be parsed (is a string not UTF-8?)")]
        ) from error


def _request_id(request: Any) -> str:
    """The request's id; one is drawn, and written into the request, where it has none."""
    drawn = secrets.token_hex(8)
    if not hasattr(request, "request_id"):
        return drawn
    if not request.request_id:
        request.request_id = drawn
    return str(request.request_id)


def _code_of(context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    code = context.code()
    for known in grpc.StatusCode:
        if code in (known, known.value[0]):
            return known
    return grpc.StatusCode.UNKNOWN
