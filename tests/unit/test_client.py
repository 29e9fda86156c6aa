"""Both clients and the command line against a made-up server on a real port."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from salver.client import (
    AsyncClient,
    Client,
    ConnectionOptions,
    FinishReason,
    InvalidArgument,
    LatencyCause,
    Message,
    Resume,
    SalverError,
    Unavailable,
)
from salver.client.cli import main
from salver.v1 import (
    common_pb2,
    explanation_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)

WORDS = ["Il", " était", " une", " fois"]


EXPLANATION = explanation_pb2.Explanation(
    parts=[
        {"cause": explanation_pb2.LATENCY_CAUSE_NO_SEAT, "duration": {"seconds": 1, "nanos": 500_000_000}},
        {"cause": explanation_pb2.LATENCY_CAUSE_DECODE, "duration": {"nanos": 500_000_000}},
        {"cause": 99, "duration": {"seconds": 7}},  # of a newer server
    ],
    device_time={"nanos": 250_000_000},
)


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self) -> None:
        self.requests: list = []
        self.deadlines: list[float] = []
        self.cancelled = threading.Event()
        self.failures_left = 0

    def _seen(self, request, context) -> None:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if self.failures_left:
            self.failures_left -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        if request.sampling.temperature < 0:
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="sampling.temperature", description="must be at least 0")
            retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2))
            status = status_pb2.Status(code=3, message="1 bad field")
            for detail in (bad, retry):
                packed = any_pb2.Any()
                packed.Pack(detail)
                status.details.append(packed)
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "1 bad field")

    def _deltas(self, make, request, context):
        self._seen(request, context)
        context.add_callback(self.cancelled.set)
        for index, word in enumerate(WORDS):
            last = index == len(WORDS) - 1
            reply = make(request_id="r1", model="m", seed=5, numerics_id="tokens-1")
            if index == 0:
                reply.prompt_token_ids.extend([8, 9])
            delta = reply.completions.add(text=word, token_ids=[index], token_offset=index)
            if last:
                delta.finish_reason = common_pb2.FINISH_REASON_STOP
                delta.stop_match.eos = True
                reply.usage.completion_tokens = len(WORDS)
                if request.explain:
                    reply.explanation.CopyFrom(EXPLANATION)
            yield reply
            if request.stopping.max_tokens == 1000 and not last:
                self.cancelled.wait(20)

    def Generate(self, request, context):
        self._seen(request, context)
        reply = generation_pb2.GenerateResponse(request_id="r1", model="m", seed=request.sampling.seed)
        reply.completions.add(text="".join(WORDS), token_ids=[0, 1, 2, 3], finish_reason=2)
        reply.timings.queue.FromMilliseconds(1500)
        if request.explain:
            reply.explanation.CopyFrom(EXPLANATION)
        return reply

    def StreamGenerate(self, request, context):
        yield from self._deltas(generation_pb2.StreamGenerateResponse, request, context)

    def Chat(self, request, context):
        self._seen(request, context)
        return generation_pb2.ChatResponse(completions=[common_pb2.Completion(text="".join(WORDS))])

    def StreamChat(self, request, context):
        yield from self._deltas(generation_pb2.StreamChatResponse, request, context)

    def Score(self, request, context):
        self.requests.append(request)
        results = [generation_pb2.ScoreResult(sum=-i, is_greedy=i == 0) for i in range(len(request.inputs))]
        return generation_pb2.ScoreResponse(results=results)


class Tokenization(tokenization_pb2_grpc.TokenizationServiceServicer):
    def Tokenize(self, request, context):
        tokens = [tokenization_pb2.Token(id=7, token=b"\xc3\xa9", start=0, end=1)]
        return tokenization_pb2.TokenizeResponse(tokens=tokens, text=request.text)

    def Detokenize(self, request, context):
        return tokenization_pb2.DetokenizeResponse(text="é" * len(request.token_ids.ids))


class Models(model_pb2_grpc.ModelServiceServicer):
    def ListModels(self, request, context):
        page = int(request.page_token or 0)
        model = model_pb2.Model(name=f"m{page}", tasks=[model_pb2.TASK_CHAT])
        return model_pb2.ListModelsResponse(models=[model], next_page_token="" if page else "1")

    def GetModel(self, request, context):
        return model_pb2.GetModelResponse(model=model_pb2.Model(name="m", bos_token_id=0))

    def GetServerInfo(self, request, context):
        return model_pb2.GetServerInfoResponse(version="9", limits=model_pb2.Limits(max_model_len=77))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Generation]]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    generation = Generation()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
    tokenization_pb2_grpc.add_TokenizationServiceServicer_to_server(Tokenization(), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)
    check = grpc.unary_unary_rpc_method_handler(
        lambda request, context: b"\x08\x01" if not request else b"\x08\x02"
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})]
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address, generation
    server.stop(None)


@pytest.fixture
def client(served: tuple[str, Generation]) -> Iterator[Client]:
    served[1].__init__()
    with Client(served[0]) as client:
        yield client


def test_every_option_reaches_the_wire(client: Client, served) -> None:
    resume = Resume({0: [4]}, seed=3, numerics_id="x")
    result = client.generate(
        [1, 2], temperature=0.0, top_p=0.5, min_p=0.1, top_k=3, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.3, n=2, seed=9, logit_bias={5: 1.5}, max_tokens=7, min_tokens=2, stop="END",
        stop_token_ids=[6], ignore_eos=True, include_stop=False, logprobs=0, prompt_logprobs=4, priority=-2,
        cache_salt="s", resume=resume, request_id="id", model="m",
    )  # fmt: skip
    (request,) = served[1].requests
    assert list(request.prompt.token_ids.ids) == [1, 2]
    sampling, stopping = request.sampling, request.stopping
    assert sampling.HasField("temperature") and sampling.temperature == 0
    assert (sampling.top_k, sampling.n, sampling.seed, dict(sampling.logit_bias)) == (3, 2, 9, {5: 1.5})
    assert (stopping.max_tokens, stopping.min_tokens, list(stopping.stop)) == (7, 2, ["END"])
    assert stopping.ignore_eos and stopping.HasField("include_stop") and list(stopping.stop_token_ids) == [6]
    assert request.logprobs.HasField("output_top_k") and request.logprobs.prompt_top_k == 4
    assert (request.priority, request.cache_salt, request.request_id, request.model) == (-2, "s", "id", "m")
    assert request.resume.seed == 3 and list(request.resume.samples[0].token_ids) == [4]
    assert result.text == "Il était une fois"
    assert result.completions[0].finish_reason is FinishReason.LENGTH
    assert result.seed == 9
    assert result.timings is not None and result.timings.queue == 1.5


def test_an_explanation(client: Client) -> None:
    assert client.generate("hi").explanation is None
    found = client.generate("hi", explain=True).explanation
    assert found is not None and found.device_seconds == 0.25
    assert found.causes == {LatencyCause.NO_SEAT: 1.5, LatencyCause.DECODE: 0.5}
    with client.stream_generate("hi", explain=True) as stream:
        assert [part.explanation for part in stream] == [None] * (len(WORDS) - 1) + [found]
    assert stream.result.explanation == found


def test_what_is_not_given_is_not_sent(client: Client, served) -> None:
    client.generate("hi")
    (request,) = served[1].requests
    assert request.prompt.text == "hi"
    # But for the seed: drawn here, so that the call can be made anew.
    assert [field.name for field, _ in request.sampling.ListFields()] == ["seed"]
    assert not request.stopping.ListFields()
    assert not request.HasField("logprobs") and not request.HasField("resume")
    with pytest.raises(TypeError):
        client.generate("hi", temprature=1)  # type: ignore[call-arg]


def test_deadlines(client: Client, served) -> None:
    client.generate("hi")
    client.generate("hi", timeout=7)
    assert 290 < served[1].deadlines[0] < 301
    assert 5 < served[1].deadlines[1] < 8  # rounded up on the wire


def test_a_stream_joined_again_and_its_resumption(client: Client) -> None:
    with client.stream_chat([Message.system("s"), Message.user("u")]) as stream:
        assert next(stream).text == "Il"
        assert stream.resume() == Resume({0: (0,)}, 5, "tokens-1", (8, 9))
        rest = [delta.text for delta in stream]
    assert rest == WORDS[1:]
    assert stream.result.text == "Il était une fois"
    assert stream.result.completions[0].token_ids == (0, 1, 2, 3)
    assert stream.result.completions[0].stop_match is not None and stream.result.completions[0].stop_match.eos
    assert stream.result.usage is not None and stream.result.usage.completion_tokens == 4
    again = client.stream_generate("p", resume=Resume({0: (11,)}, 5, "tokens-1"))
    next(again)
    assert again.resume().samples == {0: (11, 0)}


def test_leaving_a_stream_cancels_it(client: Client, served) -> None:
    with client.stream_generate("p", max_tokens=1000) as stream:
        next(stream)
    assert served[1].cancelled.wait(10)


def test_errors_bring_their_details(client: Client) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate("p", temperature=-1)
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("sampling.temperature", "must be at least 0")
    ]
    assert caught.value.retry_after == 2
    with pytest.raises(InvalidArgument):
        next(client.stream_generate("p", temperature=-1))


def test_unavailable_is_tried_again(client: Client, served) -> None:
    served[1].failures_left = 2
    assert client.generate("p").text
    served[1].failures_left = 1
    assert next(client.stream_generate("p")).text
    served[1].failures_left = 1
    with (
        Client(served[0], ConnectionOptions(max_attempts=1, resume_attempts=0)) as once,
        pytest.raises(Unavailable),
    ):
        once.generate("p")


def test_the_other_calls(client: Client) -> None:
    assert [r.sum for r in client.score([("a", "b"), ([1], [2])])] == [0, -1]
    assert client.tokenize("é")[0].token == "é".encode()
    assert client.detokenize([1, 2]) == "éé"
    assert [m.name for m in client.list_models()] == ["m0", "m1"]
    assert client.get_model().bos_token_id == 0
    assert client.server_info().limits.max_model_len == 77
    assert client.health() == "SERVING"
    assert client.health("other") == "NOT_SERVING"
    client.wait_until_serving(5)


def test_the_asynchronous_client_does_the_same(served) -> None:
    served[1].__init__()

    async def calls() -> None:
        async with AsyncClient(served[0]) as client:
            assert (await client.generate("p", seed=4)).seed == 4
            assert (await client.chat("p")).text == "Il était une fois"
            async with client.stream_generate("p") as stream:
                assert [delta.text async for delta in stream] == WORDS
                assert stream.result.text == "Il était une fois"
            async with client.stream_chat("p", max_tokens=1000) as stream:
                await anext(stream)
            with pytest.raises(InvalidArgument) as caught:
                await client.generate("p", temperature=-1)
            assert caught.value.violations
            assert len(await client.score([("a", "b")])) == 1
            assert (await client.tokenize("é"))[0].id == 7
            assert await client.detokenize([1]) == "é"
            assert [m.name for m in await client.list_models()] == ["m0", "m1"]
            assert (await client.get_model()).name == "m"
            assert (await client.server_info()).version == "9"
            assert await client.health() == "SERVING"
            await client.wait_until_serving(5)

    asyncio.run(calls())
    assert served[1].cancelled.wait(10)


def test_nobody_there() -> None:
    with (
        Client("127.0.0.1:1", ConnectionOptions(max_attempts=1, resume_attempts=0)) as client,
        pytest.raises(SalverError) as caught,
    ):
        client.generate("p", timeout=5)
    assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "hi", "--max-tokens", "3"], "Il était une fois\n"),
        (["generate", "hi", "-n", "2"], "[0] Il était une fois\n"),
        (
            ["generate", "hi", "--explain"],
            "no seat  1500.0  75%\ndecode   500.0   25%\ntotal",
        ),
        (["chat", "hi", "--explain"], "bill: 0.250000 device-seconds\n"),
        (["chat", "hi"], "Il était une fois\n"),
        (["score", "a", "b", "c"], "'c'"),
        (["tokenize", "é"], "'é'"),
        (["detokenize", "1", "2"], "éé\n"),
        (["models"], "m1"),
        (["info"], "77"),
        (["health"], "SERVING\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line(served, capsys, arguments: list[str], says: str) -> None:
    assert main([*arguments, "--address", served[0]]) == 0
    assert says in capsys.readouterr().out
    assert main([*arguments, "--address", served[0], "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_the_command_line_s_failures(served, capsys) -> None:
    assert main(["generate", "hi", "--temperature", "-1", "--address", served[0]]) == 1
    assert "sampling.temperature: must be at least 0" in capsys.readouterr().err
    assert main(["health", "other", "--address", served[0]]) == 1
    with pytest.raises(SystemExit) as caught:
        main(["no-such-command"])
    assert caught.value.code == 2


def test_the_client_is_light() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'tokenizers', 'salver.server', 'salver.model'}"
    program = f"import sys, salver.client, salver.client.cli; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
