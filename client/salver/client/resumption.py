"""Calls that outlive their servers: when to try again, after what pause, from which tokens.

Nothing here waits or calls: both clients ask it what to do. gRPC retries a call by itself
while nothing of it has come back and its budget lasts; here is what goes beyond: a stream
that was cut in the middle, and a call that was lost when so many were that the budget is spent.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import grpc

from salver.client import convert
from salver.client.accumulate import Accumulator
from salver.client.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    ResourceExhausted,
    SalverError,
    Unavailable,
    from_rpc_error,
)
from salver.client.options import ConnectionOptions
from salver.client.rpcs import Rpc
from salver.client.types import Completion, GenerateResult, Resume

_FIRST_PAUSE = 0.1  # seconds; doubled each time, and drawn from half of it to one and a half
_LONGEST_PAUSE = 2.0
_NUMERICS_MISMATCH = "NUMERICS_MISMATCH"


class Attempts:
    """The attempts of one call: one deadline for all of them, and a bounded number."""

    def __init__(self, rpc: Rpc, options: ConnectionOptions, several: bool) -> None:
        self._rpc = rpc
        self._end = time.monotonic() + rpc.timeout
        self._most = options.resume_attempts if rpc.again else 0
        self._several = several
        self._in_vain = 0  # failures since something came
        self.count = 0  # attempts after the first

    def left(self) -> float:
        """Seconds until the deadline, above 0. Raises DeadlineExceeded."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline of {self._rpc.timeout:g} s has passed"
            )
        return left

    def no_slot(self, limit: int) -> SalverError:
        """The error of a call whose deadline passed while it waited for its turn."""
        return DeadlineExceeded(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"waited {self._rpc.timeout:g} s for one of max_concurrent_calls ({limit}); nothing was sent",
        )

    def request(self) -> Any:
        """What to send now."""
        return self._rpc.request

    def pause(self, error: Any) -> float:
        """Seconds to wait before the next attempt, after a `grpc.RpcError`.

        Raises the SalverError that ends the call, when it is not one that another attempt helps.
        """
        failure = from_rpc_error(error)
        if self.count >= self._most or not failure.may_retry or not self._helps(failure):
            raise self._last(failure)
        pause = self._pause(failure)
        if pause >= self._end - time.monotonic():
            raise failure
        self.count += 1
        self._in_vain += 1
        return pause

    def _helps(self, failure: SalverError) -> bool:
        """Whether another attempt may succeed."""
        # A full queue is an answer; but what was begun elsewhere is not lost for it.
        return isinstance(failure, Unavailable) or (
            self.count > 0 and isinstance(failure, ResourceExhausted) and failure.retry_after is not None
        )

    def _last(self, failure: SalverError) -> SalverError:
        return failure

    def _pause(self, failure: SalverError) -> float:
        # Another server need not be waited for.
        if self._in_vain == 0 and (self._several or failure.retry_after is None):
            return 0.0
        drawn = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** max(0, self._in_vain - 1))
        return float(max(drawn * random.uniform(0.5, 1.5), failure.retry_after or 0.0))


class Resumption(Attempts):
    """The attempts of one stream, each from the tokens so far; joins what they bring into one answer."""

    def __init__(self, rpc: Rpc, options: ConnectionOptions, several: bool) -> None:
        super().__init__(rpc, options, several)
        self._allow_mismatch = options.allow_numerics_mismatch
        self._accumulator = Accumulator(rpc.resume)
        self._resuming = False  # the attempt under way goes on from another's tokens
        self.resumptions = 0  # attempts after the first that brought something

    @property
    def result(self) -> GenerateResult:
        return self._accumulator.result

    def resume(self) -> Resume:
        """Raises ValueError before the first message."""
        return self._accumulator.resume()

    def request(self) -> Any:
        """The caller's request, and from the second message on the tokens so far."""
        if self.count == 0 or not self._accumulator.started:
            return self._rpc.request
        self._resuming = True
        request = type(self._rpc.request)()
        request.CopyFrom(self._rpc.request)
        request.request_id = self.result.request_id
        resume = convert.to_resume(self.resume())
        resume.allow_numerics_mismatch |= self._allow_mismatch
        request.resume.CopyFrom(resume)
        # The prompt's log-probabilities came whole, with the first message.
        request.logprobs.ClearField("prompt_top_k")
        if not request.logprobs.HasField("output_top_k"):
            request.ClearField("logprobs")
        return request

    def take(self, reply: Any) -> GenerateResult | None:
        """One message, as the caller gets it; None where it says nothing new.

        Raises DataLoss when it does not go on where the last one ended.
        """
        message = self._rpc.decode(reply)
        if self._in_vain:
            self.resumptions += 1
        if self._resuming:
            message = self._continued(message)
        self._in_vain = 0
        self._accumulator.add(message)
        if self._resuming and not message.completions and message.usage is None:
            return None
        return message  # type: ignore[no-any-return]

    def _continued(self, message: GenerateResult) -> GenerateResult:
        """A message of a resumed attempt, less what the caller has."""
        new = [part for part in message.completions if self._is_new(part)]
        usage = message.usage
        if usage is not None:
            # Of the whole call: what its caller brought, not what we brought from server to server.
            brought = self._rpc.resume.samples.values() if self._rpc.resume else ()
            usage = replace(usage, resumed_tokens=sum(map(len, brought)))
        return replace(
            message,
            completions=tuple(new),
            prompt_token_ids=(),
            prompt_logprobs=(),
            configuration={},
            usage=usage,
        )

    def _is_new(self, part: Completion) -> bool:
        """Whether a delta adds something to its sample. Raises DataLoss."""
        whole = self._accumulator.completion(part.index)
        tokens = self._accumulator.num_tokens(part.index)
        text = None if whole is None else whole.text_offset + len(whole.text)
        finished = whole is not None and whole.finish_reason is not None
        if (
            part.token_offset != tokens
            or (text is not None and part.text_offset != text)
            or (finished and (part.token_ids or part.text))
        ):
            raise DataLoss(
                grpc.StatusCode.DATA_LOSS,
                f"sample {part.index} was cut after {tokens} tokens ({text} characters), and another server "
                f"went on after {part.token_offset} ({part.text_offset})",
            )
        return not finished

    def _helps(self, failure: SalverError) -> bool:
        if isinstance(failure, FailedPrecondition) and failure.reason == _NUMERICS_MISMATCH:
            return self._several  # another one may compute as the lost one did
        return super()._helps(failure)

    def _last(self, failure: SalverError) -> SalverError:
        if not (self._resuming and failure.reason == _NUMERICS_MISMATCH):
            return failure
        return FailedPrecondition(
            failure.code,
            f"the stream was cut, and {self.count} attempts found no server that computes as the lost one "
            f"did ({failure.message}); ConnectionOptions(allow_numerics_mismatch=True) goes on at any",
            reason=failure.reason,
        )
