"""All services over a real port, in this process, with an engine that makes up its tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import decoders, models, pre_tokenizers

from salver.model.chat_template import ChatTemplate
from salver.model.tokenizer import Tokenizer
from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.engine.changes import (
    AdapterFacts,
    ApplyWeights,
    Change,
    Changed,
    DropAdapter,
    DropWeights,
    LoadAdapter,
    StageWeights,
)
from salver.server.engine.config import EngineConfig
from salver.server.engine.errors import ChangeRefused, EngineUnavailable
from salver.server.engine.process import EngineState, OutputSink
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    Ready,
    SequenceOutput,
    SequenceTimings,
)
from salver.server.metrics import Metrics
from salver.server.rpc.served import Front, RequestLimits, ServedModel
from salver.server.rpc.server import STATUS_CODES, RpcServer, all_methods
from salver.v1 import (
    admin_pb2_grpc,
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
    tokenization_pb2_grpc,
)

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
EOS = 1
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)


def tiny_tokenizer(bos: int | None = 0) -> Tokenizer:
    """Bytes, and two special tokens before them: <s> 0, </s> 1."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_token_id=bos, eos_token_ids=(EOS,))


TOKENIZER = tiny_tokenizer()
VOCAB = TOKENIZER.vocab_size
ANSWER = TOKENIZER.encode("hello, wörld! ")


class FakeEngine:
    """Says ANSWER over and over, one token of each sample every turn of the loop."""

    def __init__(self) -> None:
        self.restarts = 2
        self.requests: list[EngineRequest] = []
        self.aborted: list[tuple[int, int | None]] = []
        self.running: dict[int, asyncio.Task[None]] = {}
        self.hold = asyncio.Event()  # requests start when it is set
        self.hold.set()
        self.pause_at: int | None = None  # tokens, after which nothing more comes
        self.failure: Exception | None = None
        self.unavailable: EngineUnavailable | None = None
        self.answer = ANSWER

        self.config = EngineConfig(checkpoint="")
        self.adapters: set[str] = set()  # keys
        self.may_load = asyncio.Event()  # loads end when it is set
        self.may_load.set()
        self.refusal: ChangeRefused | None = None
        self.staged: StageWeights | None = None

    async def change(self, change: Change) -> Changed:
        """Reads nothing: an adapter's digest is the text of `digest` in its directory."""
        if isinstance(change, StageWeights | ApplyWeights):
            return await self._change_weights(change)
        assert isinstance(change, LoadAdapter)
        source = change.source
        self.adapters.add(source.key)
        try:
            await self.may_load.wait()
            if self.refusal is not None:
                raise self.refusal
        except ChangeRefused:
            self.adapters.discard(source.key)
            raise
        digest = (Path(source.directory) / "digest").read_text(encoding="utf-8")
        return Changed(change.ticket, adapter=AdapterFacts(source.key, digest, rank=4, num_bytes=1000))

    async def _change_weights(self, change: StageWeights | ApplyWeights) -> Changed:
        if isinstance(change, StageWeights):
            self.staged = change
            if self.refusal is not None:
                raise self.refusal
            return Changed(change.ticket)
        assert self.staged is not None and change.staged == self.staged.ticket
        await self.may_load.wait()
        if self.unavailable is not None:
            raise self.unavailable
        digest, self.staged = self.staged.digest, None
        return Changed(change.ticket, pause=0.5, numerics_id=f"bits-{digest[:8]}")

    def tell(self, change: Change) -> None:
        if isinstance(change, DropWeights):
            if self.staged is not None and self.staged.ticket == change.staged:
                self.staged = None
            return
        assert isinstance(change, DropAdapter)
        assert change.key not in {key for key, _ in self.requests_of_adapters()}
        self.adapters.discard(change.key)

    def requests_of_adapters(self) -> list[tuple[str, bool]]:
        by_id = {request.request_id: request for request in self.requests}
        return [(by_id[number].adapter, self.hold.is_set()) for number in self.running]

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        assert not request.adapter or request.adapter in self.adapters
        if self.unavailable is not None:
            raise self.unavailable
        self.requests.append(request)
        self.running[request.request_id] = asyncio.ensure_future(self._run(request, sink))

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        self.aborted.append((request_id, sample_index))
        if sample_index is None and request_id in self.running:
            self.running.pop(request_id).cancel()

    async def _run(self, request: EngineRequest, sink: OutputSink) -> None:
        await self.hold.wait()
        sink.started(time.monotonic() - request.arrival)
        prompt = request.prompt_token_ids
        first = max(1, request.prompt_logprobs_start)
        if request.prompt_top_k is not None:
            for start in range(first, len(prompt), 4):  # in chunks, as prefill is
                chunk = [self._logprobs(t, request.prompt_top_k) for t in prompt[start : start + 4]]
                sink.put(SequenceOutput(request.request_id, 0, prompt_logprobs=chunk))
                await asyncio.sleep(0)
        if self.failure is not None:
            sink.fail(self.failure)  # type: ignore[arg-type]
            return
        timings = SequenceTimings(0.01, 0.02, 0.03, 4, 0)
        if request.stopping.max_tokens == 0:
            reason = FinishReason.LENGTH
            sink.put(SequenceOutput(request.request_id, 0, finish_reason=reason, timings=timings))
            return
        counts = {i: len(o) for i, o in zip(request.sample_indices, request.outputs, strict=True)}
        while counts:
            await asyncio.sleep(0)
            if self.pause_at in counts.values():
                await asyncio.Event().wait()
            for index in list(counts):
                token = self.answer[counts[index] % len(self.answer)]
                counts[index] += 1
                reason_now: FinishReason | None = None
                if token in request.stopping.stop_token_ids:
                    reason_now = FinishReason.STOP
                elif counts[index] >= request.stopping.max_tokens:
                    reason_now = FinishReason.LENGTH
                top_k = request.output_top_k
                output = SequenceOutput(
                    request.request_id, index, [token],
                    None if top_k is None else [self._logprobs(token, top_k)],
                    finish_reason=reason_now, timings=timings if reason_now else None,
                )  # fmt: skip
                sink.put(output)
                if reason_now is not None or (request.request_id, index) in self.aborted:
                    del counts[index]
        self.running.pop(request.request_id, None)

    @staticmethod
    def _logprobs(token: int, top_k: int) -> Logprobs:
        top = tuple((k, -float(k)) for k in range(top_k))
        return Logprobs(token, -0.5, 1 if token % 2 else 2, top)


class Service:
    """A server with its fake engine, and stubs of it."""

    def __init__(
        self, *, template: str | None = TEMPLATE, checkpoint: Path | None = None, **config: Any
    ) -> None:
        self.config = ServerConfig(model="m", port=0, **{"drain_period": 5.0, **config})
        methods = all_methods(admin=self.config.admin_port is not None)
        self.metrics = Metrics("tiny", methods=methods, codes=STATUS_CODES)
        self.front = Front(self.metrics.rejected)
        self.admission = Admission(
            self.config.max_queued_requests, self.config.max_queued_tokens, self.metrics.rejected,
            deadlines=self.config.deadline_admission,
        )  # fmt: skip
        self.engine = FakeEngine()
        self.rpc = RpcServer(self.config, self.front, self.admission, self.metrics, [("load", 0.5)])
        self.template = template
        self.checkpoint = checkpoint

    async def open(self) -> None:
        self.address = await self.rpc.open()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.tokenization: Any = tokenization_pb2_grpc.TokenizationServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        if (admin := await self.rpc.open_admin_port()) is not None:
            self.admin_address = admin
            self.admin_channel = grpc.aio.insecure_channel(admin)
            self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.admin_channel)

    def serve(self) -> None:
        ready = Ready("cpu", "float32", "torch", "2.13", "numerics-1", 1234, 17, 16, 200, 8, 64, ())
        limits = RequestLimits(
            max_model_len=200, cache_tokens=256, vocab_size=VOCAB, max_num_seqs=8, max_num_batched_tokens=64,
            max_samples=4, max_queued_requests=self.config.max_queued_requests,
            max_queued_tokens=self.config.max_queued_tokens, max_message_bytes=self.config.max_message_size,
        )  # fmt: skip
        template = None if self.template is None else ChatTemplate(self.template)
        model = ServedModel("tiny", "LlamaForCausalLM", TOKENIZER, template, ready, "abc", limits)
        if self.checkpoint is not None:
            model = replace(model, checkpoint=str(self.checkpoint))
        self.front.serve(model, self.engine)
        self.rpc.adapters.serve(self.engine)
        self.rpc.weights.serve(self.engine)
        self.rpc.set_engine_state(EngineState.SERVING)
        self.rpc.set_ready(True)

    def metric(self, name: str, **labels: str) -> float:
        found = [
            s.value
            for family in self.metrics.registry.collect()
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        ]
        assert found, name
        return sum(found)

    async def close(self) -> None:
        await self.channel.close()
        if self.config.admin_port is not None:
            await self.admin_channel.close()
        await self.rpc.close()


@asynccontextmanager
async def service(*, loading: bool = False, **config: Any) -> AsyncIterator[Service]:
    made = Service(**config)
    await made.open()
    if not loading:
        made.serve()
    try:
        yield made
    finally:
        await made.close()
    assert made.admission.waiting_requests == made.admission.waiting_tokens == 0
    assert made.admission.running_sequences == 0


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def request(text: str = "abc", kind: Any = generation_pb2.GenerateRequest, **stopping: Any) -> Any:
    return kind(
        prompt=common_pb2.Prompt(text=text),
        sampling=common_pb2.SamplingParams(temperature=0),
        stopping=common_pb2.StoppingParams(**{"max_tokens": 6, **stopping}),
    )


def stream_request(text: str = "abc", **stopping: Any) -> Any:
    return request(text, generation_pb2.StreamGenerateRequest, **stopping)


async def failure(call: Awaitable[Any]) -> tuple[Code, dict[str, Any]]:
    """The code of a call that must fail, and its details by name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailers = dict(caught.value.trailing_metadata() or ())
    details: dict[str, Any] = {
        "message": caught.value.details(), "pushback": trailers.get("grpc-retry-pushback-ms"),
    }  # fmt: skip
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    for detail in status.details:
        for kind in ("BadRequest", "ErrorInfo", "RetryInfo", "RequestInfo"):
            message = getattr(error_details_pb2, kind)()
            if detail.Unpack(message):
                details[kind] = message
    return caught.value.code(), details


def fields_of(details: dict[str, Any]) -> list[str]:
    return [violation.field for violation in details["BadRequest"].field_violations]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for knows of no event
        await asyncio.sleep(0.001)


def score_input(context: Any, continuation: Any) -> Any:
    def prompt(value: Any) -> Any:
        if isinstance(value, str):
            return common_pb2.Prompt(text=value)
        return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=value))

    return generation_pb2.ScoreInput(context=prompt(context), continuation=prompt(continuation))
