"""An answer is a pure function of the request.

The same requests, greedy and sampled, give the same tokens alone, among 32, after a
prefix-cache hit, with the prompt in chunks, and after preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import calls
from support.serving import Server, total

PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity. "
)
UNHURRIED = "--no-deadline-admission"  # a machine that does other work answers late, and answers
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "logit_bias": {30: 3.0, 40: -5.0}},
    {"temperature": 1.0, "n": 3},
]


def requests(max_tokens: int, **more: Any) -> list[Any]:
    """One request for every way of sampling, over prompts from a few tokens to many."""
    return [
        calls.generate_request(
            f"Chapter {i}. " + PASSAGE * (i % 4),
            max_tokens=max_tokens,
            seed=1000 + i,
            ignore_eos=True,
            **way,
            **more,
        )
        for i, way in enumerate(WAYS)
    ]


def growing(samples: int, max_tokens: int) -> list[Any]:
    """Samples that start together with a block of the cache each, and grow."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    return [calls.generate_request("Chapter 1.", n=samples, **fields)]


def company(count: int) -> list[Any]:
    """Others, of other lengths, that come and go meanwhile."""
    return [
        calls.generate_request(
            f"{i} other words " * (1 + i % 7), max_tokens=2 + 5 * (i % 6), temperature=i % 2, seed=i
        )
        for i in range(count)
    ]


def alone(server: Server, asked: list[Any]) -> list[list[list[int]]]:
    return [calls.tokens_of(server.generation.Generate(r, timeout=calls.TIMEOUT)) for r in asked]


def together(server: Server, asked: list[Any], others: int = 0) -> list[list[list[int]]]:
    around = company(others)
    replies = server.together([*around[: others // 2], *asked, *around[others // 2 :]])
    return [calls.tokens_of(reply) for reply in replies[others // 2 : others // 2 + len(asked)]]


Answers = list[list[list[int]]]


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2", "tiny_llama in torch"])
def checkpoint(request: pytest.FixtureRequest) -> Iterator[Path]:
    name, _, kernels = request.param.partition(" in ")
    path: Path = request.getfixturevalue(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALVER_KERNELS", kernels or "auto")
        yield path


@pytest.fixture(scope="module")
def plain(checkpoint: Path, start_module_server: Callable[..., Server]) -> Server:
    return start_module_server(checkpoint, "--max-num-seqs", "32", UNHURRIED)


@pytest.fixture(scope="module")
def truth(plain: Server) -> Answers:
    """Each alone, nothing cached."""
    answers = alone(plain, requests(48, cache_salt="nobody else"))
    # The ways differ in more than their prompts, and the answers are not one token again and again.
    assert all(len(set(tokens)) > 5 for samples in answers for tokens in samples)
    assert len({tuple(tokens) for tokens in answers[-1]}) == 3
    return answers


def test_among_32(plain: Server, truth: Answers) -> None:
    # 10 sequences of ours (n = 3 is three), and 22 others.
    assert together(plain, requests(48, cache_salt="a crowd"), others=22) == truth


def test_after_a_prefix_cache_hit(plain: Server, truth: Answers) -> None:
    asked = requests(48, cache_salt="again")
    for request in asked:
        plain.generation.Generate(request, timeout=calls.TIMEOUT)
    replies = [plain.generation.Generate(request, timeout=calls.TIMEOUT) for request in asked]
    assert [calls.tokens_of(reply) for reply in replies] == truth
    cached = [reply.usage.cached_tokens for reply in replies]
    assert sum(count > 0 for count in cached) >= 6, cached
    assert together(plain, asked, others=16) == truth


def test_with_the_prompt_in_chunks(
    checkpoint: Path, start_server: Callable[..., Server], truth: Answers
) -> None:
    server = start_server(checkpoint, "--max-num-batched-tokens", "24", "--max-num-seqs", "16", UNHURRIED)
    assert alone(server, requests(48, cache_salt="alone")) == truth
    assert together(server, requests(48), others=12) == truth


def test_without_prefix_caching(
    checkpoint: Path, start_server: Callable[..., Server], truth: Answers
) -> None:
    server = start_server(checkpoint, "--no-prefix-caching", UNHURRIED)
    for _ in range(2):
        replies = server.together(requests(48))
        assert [calls.tokens_of(reply) for reply in replies] == truth
        assert not any(reply.usage.cached_tokens for reply in replies)


def test_after_preemption(
    checkpoint: Path, start_server: Callable[..., Server], plain: Server, truth: Answers
) -> None:
    # Room for about 1000 tokens, where the batch wants 4000 and the samples want 1700.
    per_token = 16384 // 16 if "gpt2" in checkpoint.name else 8192 // 16
    memory = ("--kv-cache-memory", str(1000 * per_token))
    server = start_server(checkpoint, *memory, "--max-num-seqs", "32", UNHURRIED)
    for round_ in range(2):
        assert together(server, requests(48, cache_salt=str(round_)), others=22) == truth
    assert alone(server, growing(16, 96)) == alone(plain, growing(16, 96))
    server.wait_idle()
    assert total(server.metrics(), "salver_preemptions_total") > 0


# ---- the real model ----


def smollm2_requests(**more: Any) -> list[Any]:
    return requests(20, **more)[:7]


@pytest.fixture(scope="module")
def smollm2_truth(server: Server) -> Answers:
    return alone(server, smollm2_requests(cache_salt="nobody else"))


def test_smollm2_among_32(server: Server, smollm2_truth: Answers) -> None:
    assert together(server, smollm2_requests(cache_salt="a crowd"), others=25) == smollm2_truth


def test_smollm2_after_a_prefix_cache_hit(server: Server, smollm2_truth: Answers) -> None:
    replies = server.together(smollm2_requests(cache_salt="nobody else"))
    assert [calls.tokens_of(reply) for reply in replies] == smollm2_truth
    assert sum(reply.usage.cached_tokens > 0 for reply in replies) >= 4


def test_smollm2_in_chunks_and_preempted(
    start_server: Callable[..., Server], server: Server, smollm2_truth: Answers
) -> None:
    # Float32: 46,080 bytes a token; room for 20 blocks of 16 tokens.
    small = start_server(
        "smollm2",
        "--threads",
        "2",
        "--max-num-batched-tokens",
        "64",
        "--kv-cache-memory",
        str(320 * 46080),
        UNHURRIED,
    )
    assert together(small, smollm2_requests(), others=16) == smollm2_truth
    assert alone(small, growing(8, 48)) == alone(server, growing(8, 48))
    small.wait_idle()
    assert total(small.metrics(), "salver_preemptions_total") > 0
