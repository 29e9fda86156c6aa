"""The metrics say what happened: the test counts for itself and compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from support import calls
from support.serving import Server, total, wait_until

from salver.v1 import common_pb2, explanation_pb2, generation_pb2

REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORT: "abort",
}


@pytest.fixture(scope="module")
def own(start_module_server: Callable[..., Server], tiny_llama: Path) -> Server:
    """A server that nobody else asks anything."""
    return start_module_server(tiny_llama)


def test_tokens_requests_and_finish_reasons(own: Server) -> None:
    before = own.metrics()
    prompts = [f"request number {i} " * (1 + i % 5) for i in range(12)]
    requests = [
        calls.generate_request(
            prompt,
            max_tokens=3 + i,
            temperature=1.0,
            seed=i,
            n=1 + i % 3,
            ignore_eos=i % 2 == 0,
            # Every third ends soon: a third of the vocabulary ends it.
            stop_token_ids=range(100) if i % 3 == 2 else [],
        )
        for i, prompt in enumerate(prompts)
    ]
    replies = own.together(requests)
    streamed = calls.Collected(own.stream("a stream", max_tokens=9, ignore_eos=True))
    usages = [reply.usage for reply in replies] + [streamed.last.usage]
    reasons = Counter(REASONS[c.finish_reason] for reply in replies for c in reply.completions)
    reasons.update(REASONS[reason] for reason in streamed.finish_reasons.values())
    assert len(reasons) == 2  # the mixture above gives both
    generated = sum(len(c.token_ids) for reply in replies for c in reply.completions)
    generated += sum(map(len, streamed.tokens.values()))
    assert sum(usage.completion_tokens for usage in usages) == generated

    own.wait_idle()
    after = own.metrics()

    def delta(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert delta("salver_generation_tokens_total") == generated
    assert delta("salver_prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
    for reason in ("stop", "length"):
        assert delta("salver_request_success_total", finish_reason=reason) == reasons[reason]
    assert delta("salver_e2e_request_latency_seconds_count") == 13
    # Lengths of requests, of their samples, and of the longest sample of each.
    longest = [max(len(c.token_ids) for c in reply.completions) for reply in replies]
    longest.append(max(map(len, streamed.tokens.values())))
    for name, wanted, count in (
        ("prompt", delta("salver_prompt_tokens_total"), 13),
        ("generation", generated, sum(reasons.values())),
        ("max_generation", sum(longest), 13),
    ):
        assert delta(f"salver_request_{name}_tokens_sum") == wanted, name
        assert delta(f"salver_request_{name}_tokens_count") == count, name
    assert delta("salver_time_to_first_token_seconds_count") == sum(reasons.values())
    # Between the tokens of each sample.
    assert delta("salver_inter_token_latency_seconds_count") == generated - sum(reasons.values())
    assert delta("salver_step_duration_seconds_count") == delta("salver_batch_tokens_count") > 0
    for method, count in (("Generate", 12), ("StreamGenerate", 1)):
        assert delta("grpc_server_started_total", grpc_method=method) == count
        assert delta("grpc_server_handled_total", grpc_method=method, grpc_code="OK") == count


def test_the_bills_sum_to_the_workers_time(own: Server) -> None:
    """Of a crowd that generates and scores and is explained: together what the steps took."""
    before = own.metrics()
    made = [
        calls.generate_request(
            f"number {i} " * (i + 1), max_tokens=4 + i, n=1 + i % 2, temperature=1.0, seed=i,
            ignore_eos=True, explain=True,
        )
        for i in range(10)
    ]  # fmt: skip
    inputs = [
        generation_pb2.ScoreInput(context=calls.prompt_of("once"), continuation=calls.prompt_of(" more" * i))
        for i in range(1, 4)
    ]
    score = generation_pb2.ScoreRequest(inputs=inputs, explain=True)
    scored = own.generation.Score.future(score, timeout=calls.TIMEOUT)
    stream = own.stream("a stream", max_tokens=9, ignore_eos=True, explain=True)
    replies = [*own.together(made), scored.result()]
    *others, last = stream
    assert not any(message.HasField("explanation") for message in others)
    own.wait_idle()
    after = own.metrics()
    bill = 0
    for reply in (*replies, last):
        causes = calls.explained(reply)
        assert causes[explanation_pb2.LATENCY_CAUSE_PREFILL] > 0
        assert (explanation_pb2.LATENCY_CAUSE_DECODE in causes) == (reply is not replies[-1])
        bill += reply.explanation.device_time.ToNanoseconds()
    for name in ("salver_step_duration_seconds_sum", "salver_device_seconds_total"):
        assert bill / 1e9 == pytest.approx(total(after, name) - total(before, name), abs=1e-6), name
    assert not own.generate("nobody asked", max_tokens=1).HasField("explanation")


def test_cached_tokens(own: Server) -> None:
    prompt = [2 + i % 200 for i in range(150)]
    before = own.metrics()
    first = own.generate(prompt, max_tokens=2, cache_salt="cached").usage
    second = own.generate(prompt, max_tokens=2, cache_salt="cached").usage
    other = own.generate(prompt, max_tokens=2, cache_salt="another tenant").usage
    assert first.cached_tokens == other.cached_tokens == 0
    assert 100 <= second.cached_tokens < 150
    own.wait_idle()
    after = own.metrics()
    hits = total(after, "salver_prefix_cache_hits_total") - total(before, "salver_prefix_cache_hits_total")
    asked = total(after, "salver_prefix_cache_queries_total") - total(
        before, "salver_prefix_cache_queries_total"
    )
    assert hits == second.cached_tokens
    assert asked == 3 * 150


def test_rejections_and_errors(own: Server) -> None:
    before = own.metrics()
    for request in (
        calls.generate_request("a", temperature=-1),
        calls.generate_request("a", model="none"),
        calls.generate_request([2] * 600),
    ):
        calls.failure_of(lambda request=request: own.generation.Generate(request, timeout=10))
    after = own.metrics()
    for code in ("INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE"):
        assert (
            total(after, "grpc_server_handled_total", grpc_method="Generate", grpc_code=code)
            - total(before, "grpc_server_handled_total", grpc_method="Generate", grpc_code=code)
            == 1
        )
    rejected = total(after, "salver_rejections_total") - total(before, "salver_rejections_total")
    assert rejected >= 0
    assert total(after, "salver_generation_tokens_total") == total(before, "salver_generation_tokens_total")


def test_the_gauges_show_what_runs(own: Server) -> None:
    streams = [own.stream(f"gauge {i}", max_tokens=480, ignore_eos=True) for i in range(4)]
    for stream in streams:
        next(iter(stream))
    running, _, share = own.occupancy()
    assert 1 <= running <= 4
    assert 0 < share <= 1
    for stream in streams:
        stream.cancel()
    own.wait_idle()
    wait_until(
        "the cancelled calls in the metrics",
        lambda: (
            total(own.metrics(), "grpc_server_handled_total", grpc_code=grpc.StatusCode.CANCELLED.name) >= 4
        ),
    )
