"""Every bad field, all at once, by its path; and the arithmetic of the context."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from salver.model.generation_config import GenerationConfig
from salver.server.engine.changes import AdapterFacts
from salver.server.engine.request import Ready
from salver.server.rpc.errors import ApiError
from salver.server.rpc.served import LoadedAdapter, RequestLimits, ServedModel
from salver.server.rpc.validation import (
    Violations,
    check_generation,
    check_messages,
    check_prompt,
    check_score_length,
    model_named,
    room,
    room_for,
    stopping_of,
)
from salver.v1 import common_pb2, generation_pb2

LIMITS = RequestLimits(
    max_model_len=100, cache_tokens=160, vocab_size=50, max_num_seqs=8, max_num_batched_tokens=64,
    max_samples=4, max_queued_requests=10, max_queued_tokens=1000, max_message_bytes=1 << 20,
)  # fmt: skip
READY = Ready("cpu", "float32", "torch", "2", "ours", 1, 11, 16, 100, 8, 64, ())
MODEL = ServedModel(
    "m", "LlamaForCausalLM", cast(Any, SimpleNamespace(eos_token_ids=(2,))), None, READY, "", LIMITS
)
NAN, INF = float("nan"), float("inf")


def found(request: Any) -> list[str]:
    violations = Violations()
    check_generation(request, MODEL, violations)
    return [violation.field for violation in violations.found]


def sampling(**fields: Any) -> Any:
    bias = fields.pop("logit_bias", {})
    request = generation_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**fields))
    for token, value in bias.items():
        request.sampling.logit_bias[token] = value
    return request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", v) for v in (-0.1, NAN, INF, -INF)),
        *(("top_p", v) for v in (0, -1, 1.01, NAN)),
        *(("min_p", v) for v in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", v) for v in (0, -1, NAN, INF)),
        *((name, v) for name in ("presence_penalty", "frequency_penalty") for v in (-2.1, 2.1, NAN)),
        *(("n", v) for v in (0, 5, 2**32 - 1)),
    ],
)
def test_sampling_out_of_bounds(field: str, value: float) -> None:
    assert found(sampling(**{field: value})) == [f"sampling.{field}"]


@pytest.mark.parametrize("bias", [{5: NAN}, {5: 101.0}, {50: 1.0}])
def test_logit_bias(bias: dict[int, float]) -> None:
    assert found(sampling(logit_bias=bias)) == [f"sampling.logit_bias[{next(iter(bias))}]"]


def test_the_ends_of_the_ranges_are_inside() -> None:
    assert found(generation_pb2.GenerateRequest()) == []
    low = {
        "temperature": 0,
        "top_p": 1e-6,
        "min_p": 0,
        "presence_penalty": -2,
        "frequency_penalty": -2,
        "n": 1,
    }
    assert found(sampling(**low, logit_bias={0: -100.0})) == []
    high = {"temperature": 9, "top_p": 1, "min_p": 1, "presence_penalty": 2, "frequency_penalty": 2, "n": 4}
    assert found(sampling(**high, logit_bias={49: 100.0}, seed=2**64 - 1, top_k=2**32 - 1)) == []


@pytest.mark.parametrize(
    ("stopping", "path"),
    [
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "stopping.min_tokens"),
        ({"stop": ["a", ""]}, "stopping.stop[1]"),
        ({"stop": ["x" * 300]}, "stopping.stop[0]"),
        ({"stop": ["x"] * 17}, "stopping.stop"),
        ({"stop_token_ids": [1, 50]}, "stopping.stop_token_ids[1]"),
        ({"stop_token_ids": [1] * 2000}, "stopping.stop_token_ids"),
    ],
)
def test_stopping(stopping: dict[str, Any], path: str) -> None:
    request = generation_pb2.GenerateRequest(stopping=common_pb2.StoppingParams(**stopping))
    assert found(request) == [path]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"bad_words": ["a", ""]}, "bad_words[1]"),
        ({"bad_words": ["x" * 300]}, "bad_words[0]"),
        ({"allowed_words": ["x"] * 300}, "allowed_words"),
        ({"bad_token_sequences": [{"ids": []}]}, "bad_token_sequences[0].ids"),
        ({"bad_token_sequences": [{"ids": [1, 50]}]}, "bad_token_sequences[0].ids[1]"),
        ({"allowed_token_ids": [50]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [1] * 5000}, "allowed_token_ids"),
    ],
)
def test_words(fields: dict[str, Any], path: str) -> None:
    assert found(sampling(**fields)) == [f"sampling.{path}"]


def test_named_log_probabilities() -> None:
    def named(**fields: Any) -> Any:
        return generation_pb2.GenerateRequest(logprobs=common_pb2.LogprobParams(**fields))

    assert found(named(token_ids=[3, 50])) == ["logprobs.token_ids[1]"]
    assert found(named(token_ids=[3] * 200)) == ["logprobs.token_ids"]
    params = check_generation(named(token_ids=[3, 4]), MODEL, Violations())
    assert (params.output_top_k, params.logprob_token_ids) == (0, (3, 4))


def test_the_checkpoints_max_tokens_gives_way_to_the_context() -> None:
    model = replace(MODEL, generation_config=GenerationConfig(max_tokens=80))
    params = check_generation(generation_pb2.GenerateRequest(), model, Violations())
    assert (room_for(params, 10, LIMITS), room_for(params, 40, LIMITS)) == (80, 60)
    asked = generation_pb2.GenerateRequest(stopping=common_pb2.StoppingParams(max_tokens=80))
    with pytest.raises(ApiError):
        room_for(check_generation(asked, model, Violations()), 40, LIMITS)


def test_everything_at_once() -> None:
    request = generation_pb2.GenerateRequest(
        request_id="x\n",
        sampling=common_pb2.SamplingParams(temperature=-1, top_p=2),
        stopping=common_pb2.StoppingParams(stop=["x", ""]),
        logprobs=common_pb2.LogprobParams(output_top_k=21, prompt_top_k=20),
        priority=-11,
        cache_salt="s" * 257,
    )
    assert set(found(request)) == {
        "request_id", "sampling.temperature", "sampling.top_p", "stopping.stop[1]", "logprobs.output_top_k",
        "priority", "cache_salt",
    }  # fmt: skip


def prompt_fields(prompt: common_pb2.Prompt) -> list[str]:
    violations = Violations()
    check_prompt(prompt, "prompt", 50, violations)
    return [violation.field for violation in violations.found]


def test_prompts() -> None:
    ids = common_pb2.TokenIds
    assert prompt_fields(common_pb2.Prompt()) == ["prompt"]
    assert prompt_fields(common_pb2.Prompt(text="")) == ["prompt.text"]
    assert prompt_fields(common_pb2.Prompt(token_ids=ids())) == ["prompt.token_ids.ids"]
    assert prompt_fields(common_pb2.Prompt(token_ids=ids(ids=[1, 2, 50]))) == ["prompt.token_ids.ids[2]"]
    assert prompt_fields(common_pb2.Prompt(token_ids=ids(ids=[49]))) == []


def test_messages() -> None:
    violations = Violations()
    check_messages([], "messages", violations)
    roles = (1, 0, 99)
    check_messages([generation_pb2.Message(role=role) for role in roles], "messages", violations)
    assert [v.field for v in violations.found] == ["messages", "messages[1].role", "messages[2].role"]


def resume(**fields: Any) -> Any:
    samples = [common_pb2.Resume.Sample(index=i, token_ids=t) for i, t in fields.pop("samples", [(0, [1])])]
    request_fields = fields.pop("request", {})
    whole = {"seed": 5, "numerics_id": "ours", **fields}
    return generation_pb2.GenerateRequest(
        resume=common_pb2.Resume(samples=samples, **whole), **request_fields
    )


def test_resume() -> None:
    assert found(resume()) == []
    assert found(resume(samples=[(1, [1])])) == ["resume.samples[0].index"]
    two = {"sampling": common_pb2.SamplingParams(n=2)}
    assert found(resume(samples=[(1, [1]), (1, [2])], request=two)) == ["resume.samples[1].index"]
    assert found(resume(samples=[(0, [50])])) == ["resume.samples[0].token_ids[0]"]
    assert found(resume(prompt_token_ids=[50])) == ["resume.prompt_token_ids[0]"]
    short = {"stopping": common_pb2.StoppingParams(max_tokens=1)}
    assert found(resume(samples=[(0, [1, 2])], request=short)) == ["resume.samples[0].token_ids"]


def test_a_sampled_resume_needs_its_seed() -> None:
    assert found(resume(seed=0)) == ["resume.seed"]
    greedy = {"sampling": common_pb2.SamplingParams(temperature=0)}
    assert found(resume(seed=0, request=greedy)) == []
    assert found(resume(request={"sampling": common_pb2.SamplingParams(seed=6)})) == ["resume.seed"]
    params = check_generation(resume(), MODEL, Violations())
    assert (params.seed, params.resumed) == (5, {0: (1,)})
    same = {"sampling": common_pb2.SamplingParams(seed=0)}
    assert check_generation(resume(seed=0, request=same), MODEL, Violations()).seed == 0


def test_other_numerics() -> None:
    with pytest.raises(ApiError) as refusal:
        found(resume(numerics_id="theirs"))
    assert (refusal.value.code, refusal.value.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "NUMERICS_MISMATCH",
    )  # fmt: skip
    assert found(resume(numerics_id="theirs", allow_numerics_mismatch=True)) == []
    with pytest.raises(ApiError) as refusal:  # what the client must repair first comes first
        found(resume(numerics_id="theirs", samples=[(9, [1])]))
    assert refusal.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_model() -> None:
    assert model_named("", MODEL) is model_named("m", MODEL) is MODEL
    with pytest.raises(ApiError) as refusal:
        model_named("x" * 1000, MODEL)
    assert refusal.value.code is grpc.StatusCode.NOT_FOUND and "'m'" in refusal.value.message


def test_an_adapter_has_numerics_of_its_own() -> None:
    facts = AdapterFacts("polite@3", "abc" * 20, rank=4, num_bytes=1000)
    model = replace(MODEL, adapters=(LoadedAdapter("polite", 3, "/adapters/polite", facts),))
    found = model_named("polite", model)
    assert (found.name, found.adapter, found.weights_digest) == ("polite", "polite@3", "abc" * 20)
    assert found.ready.numerics_id == "ours+" + ("abc" * 20)[:16]
    assert model_named("m", model).adapter == ""
    with pytest.raises(ApiError, match="'m', 'polite' is"):
        model_named("rude", model)


def test_room() -> None:
    assert room(40, None, LIMITS) == 60
    assert room(40, 60, LIMITS) == 60
    for prompt, max_tokens in ((40, 61), (100, None), (1000, 1)):
        with pytest.raises(ApiError) as refusal:
            room(prompt, max_tokens, LIMITS)
        assert refusal.value.code is grpc.StatusCode.OUT_OF_RANGE
        assert str(prompt) in refusal.value.message and "100" in refusal.value.message


def test_the_cache_can_be_smaller_than_the_context() -> None:
    small = replace(LIMITS, cache_tokens=32)
    assert room(10, None, small) == 22
    with pytest.raises(
        ApiError, match="10 tokens and max_tokens is 23, together 33; the key-value cache holds 32"
    ):
        room(10, 23, small)
    check_score_length(32, "inputs[0]", small)
    with pytest.raises(ApiError, match="33 tokens"):
        check_score_length(33, "inputs[0]", small)


def test_stop_ids() -> None:
    request = generation_pb2.GenerateRequest(stopping=common_pb2.StoppingParams(stop_token_ids=[7]))
    params = check_generation(request, MODEL, Violations())
    assert stopping_of(params, 9, (2,)).stop_token_ids == {2, 7}
    request.stopping.ignore_eos = True
    params = check_generation(request, MODEL, Violations())
    assert stopping_of(params, 9, (2,)).stop_token_ids == {7}
