"""What a request may say of beams, what is in force then, and the reply."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.fake_service import ANSWER, EOS, Code, failure, fields_of, request, run, service, stream_request

from salver.client import BeamParams as ClientBeams
from salver.client import Client, InvalidArgument
from salver.client.cli import main
from salver.client.convert import from_generation, to_generation
from salver.client.testing import FakeServer
from salver.client.types import Origin
from salver.model.errors import CheckpointError
from salver.model.generation_config import GenerationConfig
from salver.server.engine.process import OutputSink
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    Ready,
    SequenceOutput,
    SequenceTimings,
)
from salver.server.rpc.beams import limits_of_beams
from salver.server.rpc.configuration import CHECKPOINT, REQUEST, SERVER
from salver.server.rpc.errors import ApiError
from salver.server.rpc.served import RequestLimits, ServedModel
from salver.server.rpc.validation import GenerationParams, Violations, check_generation, room
from salver.v1 import common_pb2, generation_pb2

NEVER = common_pb2.BeamParams.EARLY_STOPPING_NEVER
LIMITS = RequestLimits(
    max_model_len=100, cache_tokens=160, vocab_size=50, max_num_seqs=8, max_num_batched_tokens=64,
    max_samples=4, max_queued_requests=10, max_queued_tokens=1000, max_message_bytes=1 << 20,
)  # fmt: skip
READY = Ready("cpu", "float32", "torch", "2", "ours", 1, 11, 16, 100, 8, 64, ())
MODEL = ServedModel(
    "m", "LlamaForCausalLM", cast(Any, SimpleNamespace(eos_token_ids=(2,))), None, READY, "", LIMITS
)


def asked(kind: Any = generation_pb2.GenerateRequest, **parts: Any) -> Any:
    parts = {"beams": {"num_beams": 4}, **parts}
    return kind(**{name: value for name, value in parts.items() if value is not None})


def checked(asks: Any, model: ServedModel = MODEL) -> tuple[GenerationParams, list[str]]:
    violations = Violations()
    params = check_generation(asks, model, violations)
    return params, [violation.field for violation in violations.found]


def of_checkpoint(**values: Any) -> ServedModel:
    return replace(MODEL, generation_config=GenerationConfig(**values))


def test_a_search_is_greedy_and_says_what_is_in_force() -> None:
    params, wrong = checked(asked(beams={"num_beams": 4, "length_penalty": 0.6, "early_stopping": NEVER}))
    assert not wrong and params.beams == BeamParams(4, 0.6, "never")
    assert params.sampling.temperature == 0
    origins = params.configuration.origins
    assert origins["sampling.temperature"] == origins["beams.num_beams"] == REQUEST
    params, _ = checked(asked())
    assert params.beams == BeamParams(4, 1.0, False)
    assert params.configuration.beams.early_stopping == common_pb2.BeamParams.EARLY_STOPPING_HEURISTIC
    assert params.configuration.origins["beams.length_penalty"] == SERVER
    for none in (asked(beams=None), asked(beams={"num_beams": 1})):
        params, wrong = checked(none)
        assert not wrong and params.beams is None and params.sampling.temperature == 1
        assert not params.configuration.HasField("beams")
        assert not [name for name in params.configuration.origins if name.startswith("beams")]


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ({"beams": {"num_beams": 0}}, ["beams.num_beams"]),
        ({"beams": {"num_beams": 9}}, ["beams.num_beams"]),
        ({"beams": {"num_beams": 2, "length_penalty": 5.1}}, ["beams.length_penalty"]),
        ({"beams": {"num_beams": 2, "length_penalty": float("nan")}}, ["beams.length_penalty"]),
        ({"beams": {"num_beams": 2, "early_stopping": 7}}, ["beams.early_stopping"]),
        ({"beams": {"length_penalty": 2.0}}, ["beams.length_penalty"]),
        ({"beams": {"num_beams": 1, "early_stopping": NEVER}}, ["beams.early_stopping"]),
        ({"sampling": {"n": 5}}, ["sampling.n", "sampling.n"]),
        ({"sampling": {"n": 3}, "beams": {"num_beams": 2}}, ["sampling.n"]),
        ({"sampling": {"temperature": 0.5}}, ["sampling.temperature"]),
        ({"stopping": {"stop": ["x"]}}, ["stopping.stop"]),
        ({"structured_output": {"json_object": True}}, ["structured_output"]),
        ({"resume": {"seed": 3, "numerics_id": "ours"}}, ["resume"]),
        (
            {"kind": generation_pb2.ChatRequest, "tools": [{"name": "t"}], "tool_choice": {"name": "t"}},
            ["tool_choice"],
        ),
        ({"kind": generation_pb2.StreamGenerateRequest}, ["beams"]),
        ({"kind": generation_pb2.StreamChatRequest}, ["beams"]),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_field(parts: dict[str, Any], fields: list[str]) -> None:
    assert checked(asked(**parts))[1] == fields


def test_what_goes_together_with_a_search() -> None:
    _, wrong = checked(
        asked(
            sampling={"temperature": 0, "n": 4, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
            stopping={"max_tokens": 5, "min_tokens": 2, "stop_token_ids": [9], "include_stop": True},
            logprobs={"output_top_k": 2, "prompt_top_k": 0},
            priority=2, cache_salt="x",
        )
    )  # fmt: skip
    assert not wrong


def test_the_checkpoints_search_is_the_default_and_gives_way() -> None:
    model = of_checkpoint(num_beams=4, length_penalty=0.5, early_stopping=True, temperature=0.7)
    plain = asked(beams=None)
    params, wrong = checked(plain, model)
    assert not wrong and params.beams == BeamParams(4, 0.5, True) and params.sampling.temperature == 0
    origins = params.configuration.origins
    assert origins["beams.num_beams"] == origins["sampling.temperature"] == CHECKPOINT
    params, wrong = checked(asked(beams={"num_beams": 2}), model)
    assert not wrong and params.beams == BeamParams(2, 0.5, True)
    assert params.configuration.origins["beams.length_penalty"] == CHECKPOINT
    params, wrong = checked(asked(beams={"length_penalty": 2.0}), model)
    assert not wrong and params.beams == BeamParams(4, 2.0, True)
    for other in (
        asked(beams=None, sampling={"temperature": 0.5}),
        asked(beams=None, sampling={"n": 5}),
        asked(beams=None, stopping={"stop": ["x"]}),
        asked(beams=None, structured_output={"json_object": True}),
        asked(beams={"num_beams": 1}),
        asked(generation_pb2.StreamGenerateRequest, beams=None),
    ):
        params, wrong = checked(other, model)
        assert params.beams is None and wrong in ([], ["sampling.n"]), "more samples than the limit"
        assert params.sampling.temperature in (0.5, pytest.approx(0.7))
    assert checked(plain, of_checkpoint(num_beams=9))[1] == ["beams.num_beams"]
    assert checked(plain, of_checkpoint(num_beams=1, early_stopping=True))[0].beams is None


def test_what_generation_config_says_of_beams(tmp_path: Path) -> None:
    def read(**values: Any) -> GenerationConfig:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return GenerationConfig.from_directory(tmp_path)

    config = read(num_beams=6, length_penalty=0.8, early_stopping="never", num_beam_groups=1)
    assert (config.num_beams, config.length_penalty, config.early_stopping) == (6, 0.8, "never")
    assert not config.ignored
    drawn = read(num_beams=6, do_sample=True)
    assert drawn.num_beams is None and drawn.ignored == ("num_beams",)
    for values in (
        {"early_stopping": "soon", "num_beams": 2}, {"length_penalty": 9.0}, {"num_beams": 0},
        {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
        {"constraints": [{"x": 1}], "num_beams": 4}, {"force_words_ids": [[5]], "num_beams": 4},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=next(iter(values))):
            read(**values)


def test_the_room_of_a_search_is_shared_by_its_beams() -> None:
    limits = limits_of_beams(BeamParams(4), 17, MODEL)
    # Ten blocks of 16 tokens: one of the prompt for all, and two for each beam.
    assert limits.capacity == 48
    assert room(17, None, limits) == 31
    with pytest.raises(ApiError, match="key-value cache, shared by 4 beams, holds 48"):
        room(17, 32, limits)
    with pytest.raises(ApiError, match="shared by 8 beams, holds 64"):
        room(70, None, limits_of_beams(BeamParams(8), 70, MODEL))


def answer_with_beams(engine: Any) -> None:
    """The fake engine gives whole answers with scores."""

    async def answers(request: EngineRequest, sink: OutputSink) -> None:
        sink.started(0.0)
        for index in request.sample_indices:
            sink.put(SequenceOutput(request.request_id, index, computing=True))
        timings = SequenceTimings(0.01, 0.02, 0.03, 4, 0)
        for index in request.sample_indices:
            tokens, reason = [*ANSWER[: 4 - index], EOS], FinishReason.STOP
            sink.put(
                SequenceOutput(
                    request.request_id, index, tokens, None, finish_reason=reason, timings=timings,
                    score=-1.5 - index,
                )
            )  # fmt: skip

    engine._run = answers


def test_the_best_answers_come_with_their_scores() -> None:
    async def test() -> None:
        async with service() as served:
            answer_with_beams(served.engine)
            asks = request(max_tokens=10)
            asks.beams.num_beams, asks.sampling.n = 3, 2
            reply = await served.generation.Generate(asks)
            assert [(c.index, c.text, c.score) for c in reply.completions] == [
                (0, "hell", -1.5), (1, "hel", -2.5),
            ]  # fmt: skip
            assert all(c.stop_match.eos for c in reply.completions)
            assert reply.usage.completion_tokens == 9 and reply.configuration.beams.num_beams == 3
            (seen,) = served.engine.requests
            assert seen.beams == BeamParams(3, 1.0, False) and seen.sample_indices == (0, 1)
            assert served.metric("salver_generation_tokens_total") == 9
            assert served.metric("salver_time_to_first_token_seconds_count") == 2
            assert served.metric("salver_inter_token_latency_seconds_count") == 0
            result = from_generation(reply)
            assert [c.score for c in result.completions] == [-1.5, -2.5]
            assert result.configuration["early_stopping"].value is False
            assert result.configuration["num_beams"].origin is Origin.REQUEST
            plain = await served.generation.Generate(request(max_tokens=2))
            assert not plain.configuration.HasField("beams")

            stream = stream_request()
            stream.beams.num_beams = 2

            async def read() -> None:
                async for _ in served.generation.StreamGenerate(stream):
                    pass

            code, details = await failure(read())
            assert code is Code.INVALID_ARGUMENT and fields_of(details) == ["beams"]

    run(test)


def test_the_client_says_it_and_the_command_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def made(**options: Any) -> Any:
        return to_generation(generation_pb2.GenerateRequest, options).beams

    assert made(beams=4) == common_pb2.BeamParams(num_beams=4)
    full = made(beams=ClientBeams(2, 0.5, "never"))
    assert (full.num_beams, full.length_penalty, full.early_stopping) == (2, 0.5, NEVER)
    assert made(beams=ClientBeams(early_stopping=False)).early_stopping == 1
    with pytest.raises(TypeError, match="early_stopping"):
        made(beams=ClientBeams(2, early_stopping=cast(Any, "soon")))
    with FakeServer("calm") as fake:
        flags = ["--beams", "3", "-n", "2", "--length-penalty", "2", "--early-stopping", "yes"]
        assert main(["generate", "The sea", "--address", fake.address, *flags]) == 0
        (seen,) = fake.requests
        assert type(seen).__name__ == "GenerateRequest"
        assert (seen.beams.num_beams, seen.beams.length_penalty, seen.beams.early_stopping) == (3, 2.0, 2)
        assert capsys.readouterr().out == "[0 0.0000] calm\n[1 -1.0000] calm\n"
        with Client(fake.address) as client:
            assert [c.score for c in client.generate("x", beams=2, n=2).completions] == [0.0, -1.0]
            with pytest.raises(InvalidArgument, match="beams"):
                list(client.stream_generate("x", beams=2))
