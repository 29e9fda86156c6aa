"""Requests in the raw protobuf form, so that the tests do not lean on the client that they test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from salver.v1 import common_pb2, generation_pb2

Prompt = str | Sequence[int]
TIMEOUT = 120.0  # seconds; far beyond any call here, so that a hang is a failure
SAMPLING = {
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "n", "seed"),
}
STOPPING = {"max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop"}


def prompt_of(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return common_pb2.Prompt(text=prompt)
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=prompt))


def parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """Sort flat keyword arguments into sampling, stopping, logprobs and the request's own fields.

    Greedy unless a temperature is given.
    """
    fields = {"temperature": 0.0, **fields}
    sampling = common_pb2.SamplingParams(**{k: fields.pop(k) for k in SAMPLING & fields.keys()})
    for token, bias in fields.pop("logit_bias", {}).items():
        sampling.logit_bias[token] = bias
    stopping = common_pb2.StoppingParams(**{k: fields.pop(k) for k in STOPPING & fields.keys()})
    logprobs = {k: fields.pop(k) for k in ("output_top_k", "prompt_top_k") if k in fields}
    whole = {"sampling": sampling, "stopping": stopping, **fields}
    if logprobs:
        whole["logprobs"] = common_pb2.LogprobParams(**logprobs)
    return whole


def generate_request(prompt: Prompt, **fields: Any) -> Any:
    return generation_pb2.GenerateRequest(prompt=prompt_of(prompt), **parameters(fields))


def stream_request(prompt: Prompt, **fields: Any) -> Any:
    return generation_pb2.StreamGenerateRequest(prompt=prompt_of(prompt), **parameters(fields))


def chat_request(*turns: tuple[int, str], **fields: Any) -> Any:
    messages = [generation_pb2.Message(role=role, content=content) for role, content in turns]
    return generation_pb2.ChatRequest(messages=messages, **parameters(fields))


def tokens_of(reply: Any) -> list[list[int]]:
    """The token ids of every sample of an unary reply, by index."""
    return [list(c.token_ids) for c in sorted(reply.completions, key=lambda c: c.index)]


def explained(reply: Any) -> dict[int, float]:
    """Seconds by cause of a reply with an explanation, which must sum to its wall time."""
    parts = {part.cause: part.duration.ToNanoseconds() for part in reply.explanation.parts}
    assert len(parts) == len(reply.explanation.parts)
    assert sum(parts.values()) == reply.timings.total.ToNanoseconds() > 0
    return {cause: nanoseconds / 1e9 for cause, nanoseconds in parts.items()}


class Collected:
    """A stream put together, with its offsets checked on the way."""

    def __init__(self, messages: Iterable[Any]) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.finish_reasons: dict[int, int] = {}
        self.messages: list[Any] = []
        self.first_token: dict[int, int] = {}
        self.first_text: dict[int, int] = {}
        for message in messages:
            self.add(message)

    def add(self, message: Any) -> None:
        self.messages.append(message)
        for delta in message.completions:
            tokens = self.tokens.setdefault(delta.index, [])
            text = self.texts.setdefault(delta.index, "")
            # A resumed stream starts at its own offset; from there, no gap and no overlap.
            if tokens:
                assert delta.token_offset == self.first_token[delta.index] + len(tokens)
            else:
                self.first_token[delta.index] = delta.token_offset
            if text:
                assert delta.text_offset == self.first_text[delta.index] + len(text)
            elif delta.text:
                self.first_text[delta.index] = delta.text_offset
            assert delta.index not in self.finish_reasons, "a delta after the finish reason"
            tokens.extend(delta.token_ids)
            self.texts[delta.index] = text + delta.text
            if delta.finish_reason:
                self.finish_reasons[delta.index] = delta.finish_reason

    @property
    def last(self) -> Any:
        return self.messages[-1]


@dataclass
class Failure:
    """A call's error as a client of any language sees it."""

    code: grpc.StatusCode
    message: str
    fields: list[str]  # of BadRequest's violations
    reason: str  # of ErrorInfo
    retry_after: float | None  # of RetryInfo, seconds
    pushback_ms: str | None  # the trailer that gRPC's own retries read


def failure_of(call: Callable[[], Any]) -> Failure:
    """Make `call`, which must fail; its status with the details unpacked."""
    try:
        reply = call()
    except grpc.RpcError as error:
        return read_failure(error)
    raise AssertionError(f"no error, but {reply}")


def read_failure(error: Any) -> Failure:
    trailers = dict(error.trailing_metadata() or ())
    failure = Failure(
        error.code(), error.details() or "", [], "", None, trailers.get("grpc-retry-pushback-ms")
    )
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    if status.code:
        assert status.code == error.code().value[0], "the details name another code than the status"
    for detail in status.details:
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            failure.fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(info):
            failure.reason = info.reason
        elif detail.Unpack(retry):
            failure.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return failure
