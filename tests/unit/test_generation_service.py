"""Generation, scoring, tokenization and models over a real port, with an engine that makes up its tokens."""

from __future__ import annotations

import asyncio
import time

import pytest
from support.fake_service import (
    ANSWER,
    EOS,
    TOKENIZER,
    VOCAB,
    Code,
    failure,
    fields_of,
    request,
    run,
    score_input,
    service,
    stream_request,
    until,
)

from salver.server.engine.errors import EngineUnavailable, RequestFailed
from salver.server.engine.request import (
    StepMessage,
    StepStats,
)
from salver.v1 import (
    common_pb2,
    generation_pb2,
    model_pb2,
    tokenization_pb2,
)


def test_the_configuration_in_force_is_told_with_its_origins() -> None:
    async def test() -> None:
        async with service() as served:
            asked = request(max_tokens=4)
            asked.sampling.bad_words.extend(["x", "yz"])
            asked.sampling.bad_token_sequences.add(ids=[5, 6])
            reply = await served.generation.Generate(asked)
            told = reply.configuration
            assert (told.sampling.temperature, told.sampling.top_p, told.stopping.max_tokens) == (0, 1, 4)
            assert told.sampling.seed == reply.seed
            assert told.origins["sampling.temperature"] == common_pb2.CONFIGURATION_ORIGIN_REQUEST
            assert told.origins["sampling.seed"] == common_pb2.CONFIGURATION_ORIGIN_SERVER
            (engine_request,) = served.engine.requests
            encode = TOKENIZER.encode
            assert engine_request.sampling.bad_words == (
                (5, 6), *(tuple(encode(text)) for text in ("x", " x", "yz", " yz")),
            )  # fmt: skip
            asked = stream_request(max_tokens=4)
            messages = [message async for message in served.generation.StreamGenerate(asked)]
            assert [bool(m.configuration.origins) for m in messages] == [True] + [False] * (len(messages) - 1)

    run(test)


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


def test_a_deadline_that_cannot_be_met() -> None:
    """Refused on arrival, with push-back; a request without hurry waits; nothing stays behind."""

    async def test() -> None:
        async with service() as served:
            served.admission.ready(served.front.model.ready)
            for _ in range(20):  # steps take a second: 8 places, 10 tokens are 10 s
                served.admission.forecast.stepped(StepMessage([], [], StepStats(8, 8, 1.0, 1.0)))
            served.engine.hold.clear()
            patient = [
                asyncio.ensure_future(served.generation.Generate(request(max_tokens=10))) for _ in range(9)
            ]
            await until(lambda: len(served.engine.requests) == 9)
            hurried = request(max_tokens=10)
            hurried.priority = -9  # behind the others
            code, details = await failure(served.generation.Generate(hurried, timeout=15))
            assert code is Code.RESOURCE_EXHAUSTED and details["pushback"] and "RetryInfo" in details
            assert details["ErrorInfo"].reason == "DEADLINE_TOO_SHORT" and len(served.engine.requests) == 9
            score = generation_pb2.ScoreRequest(inputs=[score_input("ab", "c")], priority=-9)
            assert (await failure(served.generation.Score(score, timeout=5)))[0] is Code.RESOURCE_EXHAUSTED
            assert served.metric("salver_rejections_total", reason="deadline") == 2
            served.engine.hold.set()
            await asyncio.gather(*patient)
            assert served.admission.forecast.idle
            await served.generation.Generate(hurried, timeout=5)

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
