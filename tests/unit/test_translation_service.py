"""What requests to an encoder-decoder become, and what replies say; the engine makes up its tokens."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from support.fake_service import (
    ANSWER,
    EOS,
    TOKENIZER,
    VOCAB,
    Code,
    Service,
    failure,
    fields_of,
    request,
    run,
    score_input,
    service,
    stream_request,
)

from salver.model.encoder_spec import EncoderSpec
from salver.model.spec import LearnedPositions, ModelSpec, NormSpec, WeightMap
from salver.v1 import common_pb2, generation_pb2, inspection_pb2, inspection_pb2_grpc

NORM = NormSpec("layer", 1e-5)
ENCODER = EncoderSpec("MarianMTModel", VOCAB, 8, 2, 1, 8, 40, NORM, "relu", WeightMap())
SPEC = ModelSpec(
    "MarianMTModel", VOCAB, 8, 2, 1, 1, 8, 8, 200, NORM, LearnedPositions(), "relu", False, True, True, True,
    True, encoder=ENCODER, decoder_start_token_id=7, forced_bos_token_id=8, forced_eos_token_id=EOS,
)  # fmt: skip


@asynccontextmanager
async def translator() -> AsyncIterator[Service]:
    async with service(template=None) as served:
        model = replace(served.front.model, spec=SPEC, architecture="MarianMTModel")
        served.front.serve(model, served.engine)
        yield served


def ids(*token_ids: int) -> Any:
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=token_ids))


def test_the_prompt_is_the_source() -> None:
    async def test() -> None:
        async with translator() as served:
            reply = await served.generation.Generate(request("abc", max_tokens=10))
            (asked,) = served.engine.requests
            source = tuple(TOKENIZER.encode("abc"))
            assert (asked.source_token_ids, asked.prompt_token_ids) == (source, (7, 8))
            assert asked.stopping.forced_eos_token_id == EOS
            assert reply.completions[0].text == "hello, wö"
            assert list(reply.prompt_token_ids) == list(source)
            assert reply.usage.prompt_tokens == 3
            assert served.metric("salver_prompt_tokens_total") == 3
            messages = [m async for m in served.generation.StreamGenerate(stream_request("abc"))]
            assert messages[-1].usage.prompt_tokens == 3

    run(test)


def test_an_output_has_the_room_beside_its_source() -> None:
    async def test() -> None:
        async with translator() as served:
            asked = request("x" * 40)
            asked.stopping.Clear()
            await served.generation.Generate(asked)
            # 256 tokens of the cache less three blocks; the context of 200; less the start.
            assert served.engine.requests[0].stopping.max_tokens == 198
            code, details = await failure(served.generation.Generate(request("x" * 41)))
            assert (
                code is Code.OUT_OF_RANGE and "41 tokens; the encoder reads at most 40" in details["message"]
            )
            code, details = await failure(served.generation.Generate(request("abc", max_tokens=199)))
            assert code is Code.OUT_OF_RANGE and "room for 198" in details["message"]

    run(test)


def test_what_makes_no_sense_is_refused() -> None:
    async def test() -> None:
        async with translator() as served:
            asked = request("abc")
            asked.logprobs.prompt_top_k = 1
            asked.target_language = "fr"
            code, details = await failure(served.generation.Generate(asked))
            assert code is Code.INVALID_ARGUMENT
            assert set(fields_of(details)) == {"logprobs.prompt_top_k", "target_language"}
            chat = generation_pb2.ChatRequest()
            assert (await failure(served.generation.Chat(chat)))[0] is Code.FAILED_PRECONDITION
            inspection: Any = inspection_pb2_grpc.InspectionServiceStub(served.channel)
            nothing: dict[str, Any] = {"prompt": asked.prompt}
            for fields, wrong in (
                ({}, ["target"]),
                ({"kind": "ATTENTION_KIND_DECODER"}, ["target"]),
                ({"kind": "ATTENTION_KIND_ENCODER", "target": asked.prompt}, ["target"]),
                ({"target": asked.prompt, "view": "ATTENTION_VIEW_ROLLOUT"}, ["view"]),
                ({"target": asked.prompt, "pair": "x"}, ["pair"]),
                ({"target": ids(VOCAB), "merge_words": True}, ["target.token_ids.ids[0]", "merge_words"]),
                ({"kind": "ATTENTION_KIND_ENCODER", "layers": [2], "heads": [1]}, ["layers[0]", "heads[0]"]),
                ({"kind": 9, "target_language": "fr"}, ["kind", "target", "target_language"]),
            ):
                get = inspection.GetAttention(inspection_pb2.GetAttentionRequest(**nothing, **fields))
                code, details = await failure(get)
                assert code is Code.INVALID_ARGUMENT and sorted(fields_of(details)) == sorted(wrong)
            long = [7] * 199
            longer = inspection_pb2.GetAttentionRequest(**nothing, target=ids(*long))
            told = inspection_pb2.GetDistributionRequest(**nothing, output_token_ids=long)
            for get, problem in (
                (inspection.GetAttention(longer), "target is 201 tokens; 'tiny' reads at most 200"),
                (inspection.GetDistribution(told), "output_token_ids is 199 tokens; .* has room for 198"),
            ):
                code, details = await failure(get)
                assert code is Code.OUT_OF_RANGE and re.search(problem, details["message"])
        async with service() as served:
            asked = request("abc")
            asked.target_language = "fr"
            code, details = await failure(served.generation.Generate(asked))
            assert code is Code.INVALID_ARGUMENT and fields_of(details) == ["target_language"]
            inspection = inspection_pb2_grpc.InspectionServiceStub(served.channel)
            of_others = inspection_pb2.GetAttentionRequest(
                prompt=asked.prompt, target=asked.prompt, kind="ATTENTION_KIND_CROSS", source_language="fr"
            )
            code, details = await failure(inspection.GetAttention(of_others))
            assert code is Code.INVALID_ARGUMENT
            assert sorted(fields_of(details)) == ["kind", "source_language", "target"]

    run(test)


def test_score_is_of_the_output() -> None:
    async def test() -> None:
        async with translator() as served:
            inputs = [score_input("abc", "de"), score_input("x", "y")]
            reply = await served.generation.Score(generation_pb2.ScoreRequest(inputs=inputs))
            first = served.engine.requests[0]
            assert first.source_token_ids == tuple(TOKENIZER.encode("abc"))
            assert first.prompt_token_ids == (7, 8, *TOKENIZER.encode("de"))
            assert (first.prompt_logprobs_start, first.num_input_tokens) == (2, 5)
            assert [len(result.logprobs) for result in reply.results] == [2, 1]
            assert reply.usage.prompt_tokens == 7
            for context, continuation, field in (("", "y", "context"), ("x", "", "continuation")):
                asked = generation_pb2.ScoreRequest(inputs=[score_input(context, continuation)])
                code, details = await failure(served.generation.Score(asked))
                assert code is Code.INVALID_ARGUMENT and field in fields_of(details)[0]
            long = generation_pb2.ScoreRequest(inputs=[score_input("x" * 41, "y")])
            assert (await failure(served.generation.Score(long)))[0] is Code.OUT_OF_RANGE

    run(test)


def test_a_resumed_output_keeps_its_source() -> None:
    async def test() -> None:
        async with translator() as served:
            asked = request("abc", max_tokens=10)
            asked.resume.numerics_id = "numerics-1"
            asked.resume.prompt_token_ids.extend(TOKENIZER.encode("abc"))
            asked.resume.samples.add(index=0, token_ids=ANSWER[:4])
            reply = await served.generation.Generate(asked)
            assert served.engine.requests[0].outputs == (tuple(ANSWER[:4]),)
            assert list(reply.completions[0].token_ids) == ANSWER[4:10]
            assert (reply.usage.prompt_tokens, reply.usage.resumed_tokens) == (3, 4)

    run(test)
