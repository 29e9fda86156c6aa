"""A server in the test's own process with made-up answers, for tests of programs that call Salver.

Its answers are functions of the request, as a real server's are: equal requests get equal tokens,
from any FakeServer with the same script, and a stream that is resumed goes on where it was cut.
"""

from __future__ import annotations

import codecs
import random
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from salver.client import fake_encoding
from salver.v1 import (
    common_pb2,
    encoding_pb2_grpc,
    explanation_pb2,
    generation_pb2,
    generation_pb2_grpc,
    inspection_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

Piece = str | bytes
_WORDS = ("the ", "sea ", "was ", "calm ", b"caf\xc3", b"\xa9 ", "and ", "old ", b"\xe2\x98", b"\x83 ", ". ")
_DEFAULT_TOKENS = 16
_EXPLANATION = explanation_pb2.Explanation(
    parts=[{"cause": explanation_pb2.LATENCY_CAUSE_DECODE, "duration": {"nanos": 2_000_000}}],
    device_time={"nanos": 1_000_000},
)
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse


@dataclass(frozen=True, slots=True)
class FakeRequest:
    """What a script is asked: `prompt` is the last message of a chat; `message` is the protobuf request."""

    method: str
    prompt: str
    seed: int
    sample: int
    message: Any


Script = Callable[[FakeRequest], Iterable[Piece]]


def token_id(piece: Piece) -> int:
    """The id of a piece of text: the same in every FakeServer."""
    data = piece.encode() if isinstance(piece, str) else piece
    return zlib.crc32(data) & 0x7FFFFFFF


def made_up(request: FakeRequest) -> Iterator[Piece]:
    """Words without end, drawn by prompt, seed and sample; some tokens are half a character."""
    seed = request.seed if request.message.sampling.temperature else 0
    draw = random.Random(f"{request.prompt}/{seed}/{request.sample}")
    while True:
        yield draw.choice(_WORDS)


@dataclass(slots=True)
class _Fault:
    code: grpc.StatusCode
    message: str
    after: int
    retry_after: float | None
    reason: str


class FakeServer:
    """Use as a context manager; `address` is what a client takes.

    Args:
        script: the pieces of text of an answer, one a token: a function of a `FakeRequest`, or the pieces
            of every answer, or one text. Left out: words drawn by prompt and seed.
        port: 0 takes a free one.
        numerics_id: a stream of another one is not resumed here.
        delay: seconds before each message of a stream.
    """

    def __init__(
        self,
        script: Script | Iterable[Piece] | None = None,
        *,
        port: int = 0,
        numerics_id: str = "fake",
        delay: float = 0.0,
    ) -> None:
        self._script = _as_script(script)
        self._numerics_id = numerics_id
        self._delay = delay
        self._faults: list[_Fault] = []
        self._changed = threading.Condition()
        self._draining = False
        self._stopped = threading.Event()
        self.requests: list[Any] = []  # as they came, protobuf
        self.remaining: list[float | None] = []  # seconds to the deadline of each
        self.metadata: list[dict[str, Any]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._server)
        for kind, add in (
            (fake_encoding.FakeEncoding, encoding_pb2_grpc.add_EncodingServiceServicer_to_server),
            (fake_encoding.FakeInspection, inspection_pb2_grpc.add_InspectionServiceServicer_to_server),
        ):
            add(kind(self._accept_whole, numerics_id, token_id), self._server)
        health: dict[str, Any] = {
            "Check": grpc.unary_unary_rpc_method_handler(lambda request, context: self._health()),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("grpc.health.v1.Health", health)]
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fail(
        self,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        message: str = "made to fail",
        *,
        after: int = 0,
        times: int = 1,
        retry_after: float | None = None,
        reason: str = "",
    ) -> None:
        """The next calls end so, but those about models: a stream after so many of its messages."""
        self._faults += [_Fault(code, message, after, retry_after, reason)] * times

    def drain(self) -> None:
        """As a server that shuts down: NOT_SERVING, and no new calls; those under way go on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def stop(self) -> None:
        """As a server that is killed: every call ends UNAVAILABLE, and the port is closed."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._server.stop(None).wait()

    def _accept(self, request: Any, context: grpc.ServicerContext) -> _Fault | None:
        """Keeps what came. The fault that its stream will end with; others end the call here."""
        self.requests.append(request)
        self.remaining.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        if self._draining:
            _abort(context, _Fault(grpc.StatusCode.UNAVAILABLE, "draining", 0, 0.1, "DRAINING"))
        fault = self._faults.pop(0) if self._faults else None
        if fault is not None and fault.after == 0:
            _abort(context, fault)
        return fault

    def _accept_whole(self, request: Any, context: grpc.ServicerContext) -> None:
        """Of a call with one reply, which never is the message after a fault's."""
        fault = self._accept(request, context)
        if fault is not None:
            _abort(context, fault)

    def _health(self) -> bytes:
        return _NOT_SERVING if self._draining else _SERVING

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        last = b""
        while context.is_active() and not self._stopped.is_set():
            with self._changed:
                if self._health() == last:
                    self._changed.wait(0.2)
                    continue
                last = self._health()
            yield last


def _as_script(script: Script | Iterable[Piece] | None) -> Script:
    if script is None:
        return made_up
    if callable(script):
        return script
    pieces = [script] if isinstance(script, str | bytes) else list(script)
    return lambda request: pieces


class _Models(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        return model_pb2.GetServerInfoResponse(version="fake", numerics_id=self._fake._numerics_id)

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        return model_pb2.GetModelResponse(model=fake_encoding.model())

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        return model_pb2.ListModelsResponse(models=[fake_encoding.model()])


class _Sample:
    """One sample of an answer: pieces in, deltas out. Text that may become a stop string is held back."""

    def __init__(self, request: FakeRequest, script: Script) -> None:
        self._stopping = request.message.stopping
        self._logprobs = request.message.logprobs
        self._beams = request.message.HasField("beams")
        self._most = self._stopping.max_tokens or _DEFAULT_TOKENS
        self._pieces = iter(script(request))
        self._ahead = next(self._pieces, None)
        self._index = request.sample
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._tokens = 0
        self._length = 0
        self.finished = False

    def step(self) -> common_pb2.Completion:
        """The next token as a delta."""
        delta = common_pb2.Completion(index=self._index, text_offset=self._length, token_offset=self._tokens)
        piece, self._ahead = self._ahead, None
        if piece is not None and self._tokens < self._most:
            self._ahead = next(self._pieces, None)
            self._tokens += 1
            data = piece.encode() if isinstance(piece, str) else piece
            delta.token_ids.append(token_id(piece))
            if self._logprobs.HasField("output_top_k"):
                delta.logprobs.add(token_id=token_id(piece), token=data, rank=1, logprob=-len(data) / 10)
            self._held += self._decoder.decode(data)
        stop = next((s for s in self._stopping.stop if s in self._held), None)
        if stop is not None:
            end = self._held.index(stop) + (len(stop) if self._stopping.include_stop else 0)
            delta.finish_reason, delta.stop_match.text = common_pb2.FINISH_REASON_STOP, stop
            certain = end
        elif self._tokens >= self._most or self._ahead is None:
            self._held += self._decoder.decode(b"", final=True)
            ended = self._ahead is None and self._tokens < self._most
            delta.finish_reason = common_pb2.FINISH_REASON_STOP if ended else common_pb2.FINISH_REASON_LENGTH
            if ended:
                delta.stop_match.eos = True
            certain = len(self._held)
        else:
            prefixes = {s[:k] for s in self._stopping.stop for k in range(1, len(s))}
            unsure = max((len(p) for p in prefixes if self._held.endswith(p)), default=0)
            certain = len(self._held) - unsure
        delta.text, self._held = self._held[:certain], self._held[certain:]
        self._length += len(delta.text)
        self.finished = bool(delta.finish_reason)
        if self.finished and self._beams:
            delta.score = 0.0 - self._index
        return delta

    def replay(self, token_ids: Iterable[int]) -> common_pb2.Completion | None:
        """Takes what a lost server sent. The finish, if that finished it. Raises ValueError for other ids."""
        for known in token_ids:
            delta = self.step()
            if list(delta.token_ids) != [known]:
                raise ValueError(f"sample {self._index}: {known} is not the token at {delta.token_offset}")
            if self.finished:
                delta.ClearField("token_ids")
                delta.ClearField("text")
                delta.ClearField("logprobs")
                delta.text_offset, delta.token_offset = self._length, self._tokens
                return delta
        return None

    @property
    def num_tokens(self) -> int:
        return self._tokens


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._whole("Generate", request, context, generation_pb2.GenerateResponse)

    def Chat(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._whole("Chat", request, context, generation_pb2.ChatResponse)

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._messages("StreamGenerate", request, context, generation_pb2.StreamGenerateResponse)

    def StreamChat(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._messages("StreamChat", request, context, generation_pb2.StreamChatResponse)

    def _whole(self, method: str, request: Any, context: grpc.ServicerContext, make: Any) -> Any:
        """The messages of the stream, joined."""
        whole = make()
        parts: dict[int, Any] = {}
        for message in self._messages(method, request, context, make):
            deltas = list(message.completions)
            message.ClearField("completions")
            whole.MergeFrom(message)
            for delta in deltas:
                known = parts.setdefault(delta.index, common_pb2.Completion())
                text = known.text + delta.text
                offsets = (known.text_offset, known.token_offset) if known.token_ids else None
                known.MergeFrom(delta)
                known.text = text
                if offsets is not None:
                    known.text_offset, known.token_offset = offsets
        whole.completions.extend(parts[index] for index in sorted(parts))
        return whole

    def _messages(self, method: str, request: Any, context: grpc.ServicerContext, make: Any) -> Iterator[Any]:
        fake, numerics_id = self._fake, self._fake._numerics_id
        fault = fake._accept(request, context)
        if method.startswith("Stream") and request.HasField("beams"):
            message = "beams: cannot be streamed"
            _abort(context, _Fault(grpc.StatusCode.INVALID_ARGUMENT, message, 0, None, ""))
        resume = request.resume
        resumed = request.HasField("resume")
        if resumed and resume.numerics_id != numerics_id and not resume.allow_numerics_mismatch:
            message = f"numerics {resume.numerics_id}, and here it is {numerics_id}"
            code = grpc.StatusCode.FAILED_PRECONDITION
            _abort(context, _Fault(code, message, 0, None, "NUMERICS_MISMATCH"))
        seed = request.sampling.seed or resume.seed or 1
        prompt, prompt_ids = _prompt_of(request)
        indices = range(request.sampling.n or 1)
        samples = [
            _Sample(FakeRequest(method, prompt, seed, index, request), fake._script) for index in indices
        ]
        try:
            ends = [samples[known.index].replay(known.token_ids) for known in resume.samples]
        except (ValueError, IndexError) as error:
            _abort(context, _Fault(grpc.StatusCode.INVALID_ARGUMENT, f"resume: {error}", 0, None, ""))
        brought = sum(sample.num_tokens for sample in samples)
        held = [end for end in ends if end is not None]
        sent = 0
        while True:
            fake._stopped.wait(fake._delay)
            deltas = [*held, *(sample.step() for sample in samples if not sample.finished)]
            held = []
            message = make(
                request_id=request.request_id or "fake", model="fake", completions=deltas,
                seed=seed, numerics_id=numerics_id,
            )  # fmt: skip
            if sent == 0:
                message.prompt_token_ids.extend(prompt_ids)
                if request.logprobs.HasField("prompt_top_k"):
                    for token in prompt_ids:
                        message.prompt_logprobs.add(token_id=token, rank=1, logprob=-1.0)
            done = all(sample.finished for sample in samples)
            if done:
                message.usage.prompt_tokens = len(prompt_ids)
                message.usage.completion_tokens = sum(sample.num_tokens for sample in samples)
                message.usage.resumed_tokens = brought
                if request.explain:
                    message.explanation.CopyFrom(_EXPLANATION)
            yield message
            sent += 1
            if done:
                return
            if fault is not None and sent >= fault.after:
                _abort(context, fault)


def _prompt_of(request: Any) -> tuple[str, list[int]]:
    if hasattr(request, "messages"):
        text = request.messages[-1].content if request.messages else ""
    elif request.prompt.WhichOneof("prompt") == "token_ids":
        ids = list(request.prompt.token_ids.ids)
        return " ".join(map(str, ids)), ids
    else:
        text = request.prompt.text
    return text, [token_id(piece) for piece in re.findall(r"\s*\S+|\s+$", text)]


def _abort(context: grpc.ServicerContext, fault: _Fault) -> NoReturn:
    """Ends the call, with the details that a real server sends. Raises."""
    status = status_pb2.Status(code=fault.code.value[0], message=fault.message)
    if fault.reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=fault.reason, domain="salver"))
    trailers: list[tuple[str, str | bytes]] = []
    if fault.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(fault.retry_after * 1e9))
        status.details.add().Pack(retry)
        trailers.append(("grpc-retry-pushback-ms", str(round(fault.retry_after * 1000))))
    context.set_trailing_metadata((*trailers, ("grpc-status-details-bin", status.SerializeToString())))
    context.abort(fault.code, fault.message)
    raise AssertionError("abort raises")
