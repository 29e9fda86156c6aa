"""A stream that was cut goes on from its tokens so far, and nothing is lost, repeated or different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import calls
from support.serving import Server

from salver.v1 import common_pb2

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 8},
    {"temperature": 1.0, "presence_penalty": 1.0, "n": 2, "seed": 9},
]
PROMPT = "The sea was calm that evening, and the old man said:"


def resume(reply: Any, cuts: dict[int, list[int]], **more: Any) -> Any:
    return common_pb2.Resume(
        prompt_token_ids=reply.prompt_token_ids,
        samples=[common_pb2.Resume.Sample(index=i, token_ids=tokens) for i, tokens in cuts.items()],
        seed=reply.seed,
        numerics_id=reply.numerics_id,
        **more,
    )


def check_cuts(
    first: Server, second: Server, way: dict[str, Any], length: int, cut_points: list[int]
) -> None:
    fields = {"max_tokens": length, "ignore_eos": True, **way}
    whole = first.generate(PROMPT, **fields)
    texts = {c.index: c.text for c in whole.completions}
    tokens = {c.index: list(c.token_ids) for c in whole.completions}
    for cut in cut_points:
        # The samples of a real stream are not cut at the same place.
        cuts = {i: of[: min(cut + 3 * i, length - 1)] for i, of in tokens.items()}
        rest = calls.Collected(second.stream(PROMPT, resume=resume(whole, cuts), **fields))
        for i, of in tokens.items():
            assert cuts[i] + rest.tokens[i] == of
            assert rest.first_token[i] == len(cuts[i])
            assert texts[i][rest.first_text.get(i, len(texts[i])) :] == rest.texts[i]
        assert rest.last.usage.resumed_tokens == sum(map(len, cuts.values()))
        assert rest.last.usage.completion_tokens == sum(map(len, tokens.values()))
        assert rest.finish_reasons == dict.fromkeys(tokens, common_pb2.FINISH_REASON_LENGTH)
        assert rest.last.seed == whole.seed


@pytest.fixture(scope="module")
def replica(start_module_server: Callable[..., Server], tiny_llama: Path) -> Server:
    """Another server of the same checkpoint, with other batching."""
    return start_module_server(tiny_llama, "--max-num-batched-tokens", "32")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_on_another_replica(tiny: Server, replica: Server, way: dict[str, Any]) -> None:
    check_cuts(tiny, replica, way, 40, [0, 1, 2, 15, 16, 17, 38, 39])


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_smollm2(server: Server, way: dict[str, Any]) -> None:
    check_cuts(server, server, way, 24, [1, 12, 23])


def test_an_unseeded_answer_can_be_had_again(tiny: Server) -> None:
    one = tiny.generate(PROMPT, temperature=1.0, max_tokens=20)
    other = tiny.generate(PROMPT, temperature=1.0, max_tokens=20)
    assert one.seed != other.seed
    again = tiny.generate(PROMPT, temperature=1.0, max_tokens=20, seed=one.seed)
    assert calls.tokens_of(again) == calls.tokens_of(one)


def test_a_stop_string_across_the_cut(server: Server) -> None:
    """Half of the stop string came before the cut, half of it comes after."""
    free = server.generate(PROMPT, max_tokens=24, ignore_eos=True)
    ids = list(free.completions[0].token_ids)
    words = free.completions[0].text.split(" ")
    stop = " ".join(words[5:8])
    whole = server.generate(PROMPT, max_tokens=24, stop=[stop])
    (completion,) = whole.completions
    assert completion.stop_match.text == stop and stop not in completion.text
    for cut in range(1, len(completion.token_ids)):
        rest = calls.Collected(
            server.stream(PROMPT, max_tokens=24, stop=[stop], resume=resume(whole, {0: ids[:cut]}))
        )
        assert rest.finish_reasons == {0: common_pb2.FINISH_REASON_STOP}
        assert ids[:cut] + rest.tokens[0] == list(completion.token_ids)
        offset = rest.first_text.get(0, len(completion.text))
        assert completion.text[offset:] == rest.texts[0]


def test_other_numerics_are_refused_unless_allowed(tiny: Server) -> None:
    whole = tiny.generate(PROMPT, max_tokens=8, ignore_eos=True)
    ids = list(whole.completions[0].token_ids)
    whole.numerics_id = "another machine"
    call = {"max_tokens": 8, "ignore_eos": True}
    failure = calls.failure_of(lambda: tiny.generate(PROMPT, resume=resume(whole, {0: ids[:3]}), **call))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NUMERICS_MISMATCH")
    allowed = resume(whole, {0: ids[:3]}, allow_numerics_mismatch=True)
    assert tiny.generate(PROMPT, resume=allowed, **call).usage.resumed_tokens == 3


def test_a_resume_that_does_not_fit_is_refused(tiny: Server) -> None:
    whole = tiny.generate(PROMPT, max_tokens=8, ignore_eos=True)
    ids = list(whole.completions[0].token_ids)
    other_prompt = resume(whole, {0: ids[:3]})
    other_prompt.prompt_token_ids[0] += 1
    for bad in (
        other_prompt,
        resume(whole, {5: ids[:3]}),
        resume(whole, {0: [100000]}),
        resume(whole, {0: [*ids, *ids]}),
    ):
        failure = calls.failure_of(lambda bad=bad: tiny.generate(PROMPT, resume=bad, max_tokens=8))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.fields and all(field.startswith("resume") for field in failure.fields)
