"""All services over a real port, in this process, with an engine that makes up its tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import tokenizers
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tokenizers import decoders, models, pre_tokenizers

from salver.model.chat_template import ChatTemplate
from salver.model.tokenizer import Tokenizer
from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.engine.errors import EngineUnavailable, RequestFailed
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
from salver.server.rpc.server import SERVICES, STATUS_CODES, RpcServer, all_methods
from salver.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
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

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
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
                token = ANSWER[counts[index] % len(ANSWER)]
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

    def __init__(self, *, template: str | None = TEMPLATE, **config: Any) -> None:
        self.config = ServerConfig(model="m", port=0, **{"drain_period": 5.0, **config})
        self.metrics = Metrics("tiny", methods=all_methods(), codes=STATUS_CODES)
        self.front = Front(self.metrics.rejected)
        self.admission = Admission(
            self.config.max_queued_requests, self.config.max_queued_tokens, self.metrics.rejected
        )
        self.engine = FakeEngine()
        self.rpc = RpcServer(self.config, self.front, self.admission, self.metrics, [("load", 0.5)])
        self.template = template

    async def open(self) -> None:
        self.address = await self.rpc.open()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.tokenization: Any = tokenization_pb2_grpc.TokenizationServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def serve(self) -> None:
        ready = Ready("cpu", "float32", "torch", "2.13", "numerics-1", 1234, 17, 16, 200, 8, 64, ())
        limits = RequestLimits(
            max_model_len=200, cache_tokens=256, vocab_size=VOCAB, max_num_seqs=8, max_num_batched_tokens=64,
            max_samples=4, max_queued_requests=self.config.max_queued_requests,
            max_queued_tokens=self.config.max_queued_tokens, max_message_bytes=self.config.max_message_size,
        )  # fmt: skip
        template = None if self.template is None else ChatTemplate(self.template)
        model = ServedModel("tiny", "LlamaForCausalLM", TOKENIZER, template, ready, "abc", limits)
        self.front.serve(model, self.engine)
        self.rpc.health.set_engine_state(EngineState.SERVING)
        self.rpc.health.set_ready(True)

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


def test_generate() -> None:
    async def test() -> None:
        async with service() as served:
            reply = await served.generation.Generate(request(max_tokens=10))
            (completion,) = reply.completions
            assert completion.text == "hello, wö"
            assert list(completion.token_ids) == ANSWER[:10]
            assert completion.finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert (reply.model, reply.numerics_id) == ("tiny", "numerics-1")
            assert reply.seed and reply.request_id
            assert list(reply.prompt_token_ids) == TOKENIZER.encode("abc")
            assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 10)
            assert reply.timings.total.ToTimedelta().total_seconds() > 0
            assert served.metric("salver_generation_tokens_total") == 10
            assert served.metric("salver_prompt_tokens_total") == 3
            assert served.metric("salver_request_success_total", finish_reason="length") == 1
            assert served.metric("salver_e2e_request_latency_seconds_count") == 1
            await until(lambda: served.metric("grpc_server_handled_total", grpc_code="OK") == 1)

    run(test)


def test_what_the_engine_is_asked() -> None:
    async def test() -> None:
        async with service() as served:
            asked = request(stop_token_ids=[9], min_tokens=2)
            asked.sampling.n, asked.sampling.seed, asked.priority, asked.cache_salt = 2, 77, 3, "tenant"
            asked.request_id = "mine"
            reply = await served.generation.Generate(asked, timeout=50)
            (seen,) = served.engine.requests
            assert (reply.request_id, reply.seed) == ("mine", 77)
            assert [c.index for c in reply.completions] == [0, 1]
            assert seen.sample_indices == (0, 1) and seen.outputs == ((), ())
            assert seen.stopping.stop_token_ids == {9, EOS} and seen.stopping.min_tokens == 2
            assert (seen.priority, seen.cache_salt, seen.sampling.seed) == (3, "tenant", 77)
            assert 40 < seen.deadline - time.monotonic() < 51
            # Unset max_tokens: to the end of the context; unset deadline: none.
            asked.stopping.ClearField("max_tokens")
            await served.generation.Generate(asked)
            assert served.engine.requests[-1].stopping.max_tokens == 200 - 3
            assert served.engine.requests[-1].deadline == float("inf")

    run(test)


def test_stream() -> None:
    async def test() -> None:
        async with service() as served:
            asked = stream_request(max_tokens=20)
            asked.logprobs.prompt_top_k = 2
            asked.logprobs.output_top_k = 0
            messages = [message async for message in served.generation.StreamGenerate(asked)]
            deltas = [delta for message in messages for delta in message.completions]
            assert "".join(d.text for d in deltas) == "hello, wörld! hello"
            assert [t for d in deltas for t in d.token_ids] == (ANSWER * 2)[:20]
            assert sum(len(d.logprobs) for d in deltas) == 20
            first, last = messages[0], messages[-1]
            assert [p.token_id for p in first.prompt_logprobs] == TOKENIZER.encode("abc")
            assert not first.prompt_logprobs[0].HasField("logprob") and first.prompt_logprobs[0].rank == 0
            assert first.prompt_logprobs[1].logprob == -0.5 and len(first.prompt_logprobs[1].top) == 2
            assert first.prompt_logprobs[1].token == b"b"
            assert all(not m.prompt_logprobs and not m.prompt_token_ids for m in messages[1:])
            assert last.usage.completion_tokens == 20 and last.HasField("timings")
            assert all(not m.HasField("usage") for m in messages[:-1])
            assert {m.seed for m in messages} == {first.seed}

    run(test)


def test_stop_string_aborts_its_sample_in_the_engine() -> None:
    async def test() -> None:
        async with service() as served:
            reply = await served.generation.Generate(request(max_tokens=100, stop=["lo, w"]))
            (completion,) = reply.completions
            assert completion.text == "hel" and completion.stop_match.text == "lo, w"
            assert served.engine.aborted[0][1] == 0
            assert served.metric("salver_generation_tokens_total") == len(completion.token_ids)

    run(test)


def test_chat() -> None:
    async def test() -> None:
        async with service() as served:
            asked = generation_pb2.ChatRequest(
                messages=[
                    generation_pb2.Message(role=generation_pb2.ROLE_SYSTEM, content="be kind"),
                    generation_pb2.Message(role=generation_pb2.ROLE_USER, content="hi"),
                ],
                stopping=common_pb2.StoppingParams(max_tokens=5),
            )
            asked.template_kwargs["mood"] = "!"
            reply = await served.generation.Chat(asked)
            assert TOKENIZER.decode(reply.prompt_token_ids) == "[system]be kind[user]hi[assistant]!"
            assert reply.completions[0].text == "hello"
            stream = generation_pb2.StreamChatRequest.FromString(asked.SerializeToString())
            texts = [d.text async for m in served.generation.StreamChat(stream) for d in m.completions]
            assert "".join(texts) == "hello"
            asked.continue_final_message = True
            reply = await served.generation.Chat(asked)
            assert TOKENIZER.decode(reply.prompt_token_ids).endswith("[user]hi")
            asked.add_generation_prompt = True
            asked.template_kwargs["messages"] = "x"
            code, details = await failure(served.generation.Chat(asked))
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, ["add_generation_prompt"])
            asked.ClearField("add_generation_prompt")
            code, details = await failure(served.generation.Chat(asked))
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, ["template_kwargs.messages"])

    run(test)


def test_chat_without_a_template() -> None:
    async def test() -> None:
        async with service(template=None) as served:
            code, details = await failure(served.generation.Chat(generation_pb2.ChatRequest()))
            assert code is Code.FAILED_PRECONDITION
            assert details["ErrorInfo"].reason == "TASK_NOT_SUPPORTED"
            models = (await served.models.ListModels(model_pb2.ListModelsRequest())).models
            tasks = [model_pb2.TASK_GENERATE, model_pb2.TASK_SCORE, model_pb2.TASK_EMBED]
            assert list(models[0].tasks) == tasks

    run(test)


def score_input(context: Any, continuation: Any) -> Any:
    def prompt(value: Any) -> Any:
        if isinstance(value, str):
            return common_pb2.Prompt(text=value)
        return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=value))

    return generation_pb2.ScoreInput(context=prompt(context), continuation=prompt(continuation))


def test_score() -> None:
    async def test() -> None:
        async with service() as served:
            ids = TOKENIZER.encode("bc")
            inputs = [
                *(score_input("a", "bc"), score_input([2, 3], ids), score_input("a", ids)),
                *(score_input([], "bc"), score_input("", ids), score_input([0], [3, 3])),
            ]
            reply = await served.generation.Score(generation_pb2.ScoreRequest(inputs=inputs, top_k=3))
            assert [[p.token_id for p in r.logprobs] for r in reply.results] == [ids] * 5 + [[3, 3]]
            assert [r.sum for r in reply.results] == [-1.0] * 6
            assert [r.is_greedy for r in reply.results] == [all(t % 2 for t in ids)] * 5 + [True]
            assert len(reply.results[0].logprobs[0].top) == 3
            asked = [(r.prompt_token_ids, r.prompt_logprobs_start) for r in served.engine.requests]
            bc, bos = tuple(ids), (0,)
            a = tuple(TOKENIZER.encode("a"))
            assert asked == [
                (a + bc, 1),
                ((2, 3, *bc), 2),
                (a + bc, 1),
                (bos + bc, 1),
                (bos + bc, 1),
                ((0, 3, 3), 1),
            ]
            assert all(r.stopping.max_tokens == 0 and r.prompt_top_k == 3 for r in served.engine.requests)
            assert reply.usage.prompt_tokens == sum(len(p) for p, _ in asked)
            assert served.metric("salver_request_success_total", finish_reason="score") == 6

            for bad, field in (
                ([], "inputs"),
                ([score_input("a", "b"), score_input("a", "")], "inputs[1].continuation.text"),
                ([score_input([VOCAB], "b")], "inputs[0].context.token_ids.ids[0]"),
            ):
                asking = served.generation.Score(generation_pb2.ScoreRequest(inputs=bad))
                code, details = await failure(asking)
                assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, [field])
            asking = served.generation.Score(
                generation_pb2.ScoreRequest(inputs=[score_input("a" * 300, "b")])
            )
            assert (await failure(asking))[0] is Code.OUT_OF_RANGE

    run(test)


def test_bad_requests_never_reach_the_engine() -> None:
    async def test() -> None:
        async with service() as served:
            bad = request("", stop=[""])
            bad.sampling.temperature = -1
            bad.request_id = "r-1"
            code, details = await failure(served.generation.Generate(bad))
            assert code is Code.INVALID_ARGUMENT
            assert set(fields_of(details)) == {"prompt.text", "sampling.temperature", "stopping.stop[0]"}
            assert details["RequestInfo"].request_id == "r-1"
            code, details = await failure(served.generation.Generate(request("x" * 150, max_tokens=51)))
            assert code is Code.OUT_OF_RANGE
            assert all(number in details["message"] for number in ("150", "51", "200"))
            other = request()
            other.model = "other"
            assert (await failure(served.generation.Generate(other)))[0] is Code.NOT_FOUND
            streaming = served.generation.StreamGenerate(stream_request(""))
            assert (await failure(streaming.read()))[0] is Code.INVALID_ARGUMENT
            raw = served.channel.unary_unary("/salver.v1.GenerationService/Generate")
            assert (await failure(raw(b"\x0a\x02\xc3\x28")))[0] is Code.INVALID_ARGUMENT
            unknown = served.channel.unary_unary("/salver.v1.GenerationService/Levitate")
            assert (await failure(unknown(b"")))[0] is Code.UNIMPLEMENTED
            assert served.engine.requests == []

    run(test)


def test_resume_sends_the_tokens_so_far() -> None:
    async def test() -> None:
        async with service() as served:
            asked = stream_request(max_tokens=10)
            asked.resume.CopyFrom(common_pb2.Resume(numerics_id="numerics-1", seed=4))
            asked.resume.samples.add(index=0, token_ids=ANSWER[:4])
            asked.resume.prompt_token_ids.extend(TOKENIZER.encode("abc"))
            messages = [m async for m in served.generation.StreamGenerate(asked)]
            deltas = [d for m in messages for d in m.completions]
            assert (deltas[0].text_offset, deltas[0].token_offset) == (4, 4)
            assert "".join(d.text for d in deltas) == "o, wö"
            assert served.engine.requests[0].outputs == (tuple(ANSWER[:4]),)
            assert (messages[-1].usage.completion_tokens, messages[-1].usage.resumed_tokens) == (10, 4)
            assert messages[-1].seed == 4
            assert served.metric("salver_generation_tokens_total") == 6
            asked.resume.prompt_token_ids[0] += 1
            code, details = await failure(served.generation.StreamGenerate(asked).read())
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, ["resume.prompt_token_ids"])

    run(test)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cancelled_call_is_aborted_in_the_engine(streaming: bool) -> None:
    async def test() -> None:
        async with service() as served:
            if streaming:
                served.engine.pause_at = 3
                call = served.generation.StreamGenerate(stream_request(max_tokens=190))
                await call.read()
            else:
                served.engine.hold.clear()
                call = served.generation.Generate(request(max_tokens=190))
                await until(lambda: served.engine.requests)
            call.cancel()
            await until(lambda: served.engine.aborted)
            assert served.engine.aborted == [(served.engine.requests[0].request_id, None)]
            await until(lambda: served.metric("grpc_server_handled_total", grpc_code="CANCELLED") == 1)

    run(test)


def test_a_deadline_is_aborted_in_the_engine() -> None:
    async def test() -> None:
        async with service() as served:
            served.engine.hold.clear()
            code, _ = await failure(served.generation.Generate(request(), timeout=0.1))
            assert code is Code.DEADLINE_EXCEEDED
            await until(lambda: served.engine.aborted)
            name = "grpc_server_handled_total"
            await until(lambda: served.metric(name, grpc_code="DEADLINE_EXCEEDED") == 1)

    run(test)


def test_a_slow_reader_gets_merged_messages() -> None:
    async def test() -> None:
        async with service() as served:
            call = served.generation.StreamGenerate(stream_request(max_tokens=190))
            await until(lambda: served.engine.requests and not served.engine.running)
            messages = [message async for message in call]
            tokens = [t for m in messages for d in m.completions for t in d.token_ids]
            assert tokens == (ANSWER * 20)[:190]
            assert len(messages) < 190

    run(test)


def test_errors_of_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with service() as served:
            served.engine.failure = RequestFailed("a secret of the worker")
            asked = request()
            asked.request_id = "r-7"
            code, details = await failure(served.generation.Generate(asked))
            assert code is Code.INTERNAL
            assert "secret" not in details["message"] and "r-7" in details["message"]
            served.engine.failure = None
            served.engine.unavailable = EngineUnavailable("restarting", 3.0)
            code, details = await failure(served.generation.Generate(request()))
            assert (code, details["pushback"]) == (Code.UNAVAILABLE, "3000")
            assert details["RetryInfo"].retry_delay.seconds == 3
            assert served.metric("salver_rejections_total", reason="unavailable") == 1

    run(test)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    fields = record.__dict__["salver_fields"]
    assert (fields["request_id"], fields["reason"]) == ("r-7", "a secret of the worker")


def test_a_bug_is_opaque(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with service() as served:
            monkeypatch.setattr(TOKENIZER, "encode", lambda *a, **k: 1 / 0)
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.INTERNAL and "division" not in details["message"]

    run(test)
    assert any(r.exc_info and isinstance(r.exc_info[1], ZeroDivisionError) for r in caplog.records)


def test_a_full_queue() -> None:
    async def test() -> None:
        async with service(max_queued_requests=2) as served:
            served.engine.hold.clear()
            waiting = [asyncio.ensure_future(served.generation.Generate(request())) for _ in range(2)]
            await until(lambda: len(served.engine.requests) == 2)
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.RESOURCE_EXHAUSTED and details["pushback"] and "RetryInfo" in details
            served.engine.hold.set()
            await asyncio.gather(*waiting)
            await served.generation.Generate(request())
            assert served.metric("salver_rejections_total") == 1

    run(test)


def test_tokenization() -> None:
    async def test() -> None:
        async with service() as served:
            asked = tokenization_pb2.TokenizeRequest(text="wö")
            tokens = (await served.tokenization.Tokenize(asked)).tokens
            assert b"".join(t.token for t in tokens) == "wö".encode()
            assert [(t.start, t.end) for t in tokens] == [(0, 1), (1, 2), (1, 2)]
            ids = common_pb2.TokenIds(ids=[0, *(t.id for t in tokens), 1])
            text = await served.tokenization.Detokenize(tokenization_pb2.DetokenizeRequest(token_ids=ids))
            assert text.text == "wö"
            whole = tokenization_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
            assert (await served.tokenization.Detokenize(whole)).text == "<s>wö</s>"
            talk = tokenization_pb2.TokenizeRequest()
            talk.conversation.messages.add(role=generation_pb2.ROLE_USER, content="hi")
            assert (await served.tokenization.Tokenize(talk)).text == "[user]hi[assistant]"
            for call, bad, field in (
                (served.tokenization.Tokenize, tokenization_pb2.TokenizeRequest(), "input"),
                (served.tokenization.Detokenize, tokenization_pb2.DetokenizeRequest(), "token_ids"),
            ):
                code, details = await failure(call(bad))
                assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, [field])
            long = tokenization_pb2.TokenizeRequest(text="ab" * 10_000)
            assert len((await served.tokenization.Tokenize(long)).tokens) == 20_000

    run(test)


def test_models() -> None:
    async def test() -> None:
        async with service() as served:
            (model,) = (await served.models.ListModels(model_pb2.ListModelsRequest())).models
            assert (await served.models.GetModel(model_pb2.GetModelRequest(model="tiny"))).model == model
            assert (model.name, model.vocab_size, model.max_model_len) == ("tiny", VOCAB, 200)
            assert (model.num_parameters, model.weights_digest) == (1234, "abc")
            assert list(model.eos_token_ids) == [EOS] and model.bos_token_id == 0
            asked = model_pb2.GetModelRequest(model="x")
            assert (await failure(served.models.GetModel(asked)))[0] is Code.NOT_FOUND
            paged = model_pb2.ListModelsRequest(page_token="x")
            assert (await failure(served.models.ListModels(paged)))[0] is Code.INVALID_ARGUMENT
            info = await served.models.GetServerInfo(model_pb2.GetServerInfoRequest())
            assert (info.limits.kv_cache_tokens, info.limits.max_samples) == (256, 4)
            assert info.drain_period.seconds == 5 and info.worker_restarts == 2
            assert [(p.name, p.duration.ToTimedelta().total_seconds()) for p in info.startup_phases] == [
                ("load", 0.5)
            ]

    run(test)


async def health_of(served: Service, name: str = "") -> int:
    reply = await served.health.Check(health_pb2.HealthCheckRequest(service=name))
    return int(reply.status)


def test_loading() -> None:
    async def test() -> None:
        async with service(loading=True) as served:
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.UNAVAILABLE and details["pushback"] and "RetryInfo" in details
            assert [await health_of(served, n) for n in ("", "readiness", "liveness")] == [
                NOT_SERVING, NOT_SERVING, SERVING,
            ]  # fmt: skip
            served.serve()
            await served.generation.Generate(request())
            for name in ("", "readiness", "liveness", *SERVICES):
                assert await health_of(served, name) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_of(served, "nobody")
            assert caught.value.code() is Code.NOT_FOUND

    run(test)


def test_health_follows_the_engine_and_every_watcher_hears_of_it() -> None:
    async def test() -> None:
        async with service() as served:
            asked = health_pb2.HealthCheckRequest()
            first, second = served.health.Watch(asked), served.health.Watch(asked)
            assert [(await w.read()).status for w in (first, second)] == [SERVING, SERVING]
            first.cancel()  # must not cost the second watcher its news
            await asyncio.sleep(0.02)
            served.rpc.health.set_engine_state(EngineState.STALLED)
            assert (await second.read()).status == NOT_SERVING
            assert await health_of(served, "liveness") == NOT_SERVING
            served.rpc.health.set_engine_state(EngineState.RESTARTING)
            assert await health_of(served, "liveness") == SERVING
            assert await health_of(served, SERVICES[0]) == NOT_SERVING
            served.rpc.health.set_engine_state(EngineState.SERVING)
            assert (await second.read()).status == SERVING
            unknown = served.health.Watch(health_pb2.HealthCheckRequest(service="later"))
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

    run(test)


def test_a_drain_lets_streams_finish() -> None:
    async def test() -> None:
        async with service() as served:
            served.engine.hold.clear()
            running = served.generation.StreamGenerate(stream_request(max_tokens=20))
            await until(lambda: served.engine.requests)
            draining = asyncio.ensure_future(served.rpc.drain())
            await until(lambda: served.rpc.health.status("") == NOT_SERVING)
            code, details = await failure(served.generation.Generate(request()))
            assert code is Code.UNAVAILABLE and details["pushback"]
            assert await health_of(served, "liveness") == SERVING
            assert not draining.done()
            served.engine.hold.set()
            tokens = [t async for m in running for d in m.completions for t in d.token_ids]
            assert len(tokens) == 20
            await draining

    run(test)


def test_a_drain_has_an_end() -> None:
    async def test() -> None:
        async with service(drain_period=0.05) as served:
            served.engine.hold.clear()
            running = served.generation.StreamGenerate(stream_request())
            scoring = served.generation.Score(generation_pb2.ScoreRequest(inputs=[score_input("a", "b")]))
            await until(lambda: len(served.engine.requests) == 2)
            await served.rpc.drain()
            for call in (running.read(), scoring):
                code, details = await failure(call)
                assert code is Code.UNAVAILABLE and details["pushback"]

    run(test)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(version: str) -> None:
    async def test() -> None:
        async with service() as served:
            ask = served.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            symbol = f"grpc.reflection.{version}.ServerReflection"
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="salver.v1.GenerationService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
            ]
            listed, ours, own = [reply async for reply in ask(iter(requests))]
            names = {s.name for s in listed.list_services_response.service}
            assert names >= {*SERVICES, "grpc.health.v1.Health", symbol}
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in ours.file_descriptor_response.file_descriptor_proto
            ]
            assert {f.name for f in files} >= {"salver/v1/generation.proto", "salver/v1/common.proto"}
            (file,) = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in own.file_descriptor_response.file_descriptor_proto
            ]
            assert file.package == f"grpc.reflection.{version}"
            assert [service.name for service in file.service] == ["ServerReflection"]
            messages = {field.type_name for message in file.message_type for field in message.field}
            assert {name.rpartition(".")[0] for name in messages if name} == {f".grpc.reflection.{version}"}

    run(test)
