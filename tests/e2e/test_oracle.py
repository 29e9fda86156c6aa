"""Greedy tokens over gRPC equal transformers' own, token for token, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import calls
from support.checkpoints import Reference
from support.serving import Server

from salver.v1 import generation_pb2

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 5, 8, 13, 21,",
    "Die Katze saß auf der Matte — und 😀",
]


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_checkpoint: Path) -> Reference:
    return Reference(smollm2_checkpoint)


def test_smollm2_greedy(server: Server, smollm2_reference: Reference) -> None:
    requests = [calls.generate_request(prompt, max_tokens=24) for prompt in PROMPTS]
    for prompt, reply in zip(PROMPTS, server.together(requests), strict=True):
        ids = smollm2_reference.tokenizer.encode(prompt)
        assert list(reply.prompt_token_ids) == ids, prompt
        assert calls.tokens_of(reply) == [smollm2_reference.greedy(ids, 24)], prompt


def test_smollm2_chat(server: Server, smollm2_reference: Reference) -> None:
    """The same template, the same tokens, the same answer, up to the end of the turn."""
    question = "What is the capital of France? Answer in one word."
    ids = smollm2_reference.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    request = calls.chat_request((generation_pb2.ROLE_USER, question), max_tokens=32)
    reply = server.generation.Chat(request, timeout=calls.TIMEOUT)
    assert list(reply.prompt_token_ids) == list(ids)
    assert calls.tokens_of(reply) == [smollm2_reference.greedy(list(ids), 32)]
    assert "Paris" in reply.completions[0].text


def test_smollm2_logprobs(server: Server, smollm2_reference: Reference) -> None:
    import torch

    ids = smollm2_reference.tokenizer.encode(PROMPTS[2])
    reply = server.generate(ids, max_tokens=4, output_top_k=3, prompt_top_k=0)
    whole = ids + calls.tokens_of(reply)[0]
    with torch.inference_mode():
        truth = torch.log_softmax(smollm2_reference.model(torch.tensor([whole])).logits[0].float(), -1)
    got = [*reply.prompt_logprobs[1:], *reply.completions[0].logprobs]
    assert not reply.prompt_logprobs[0].HasField("logprob")
    assert [entry.token_id for entry in got] == whole[1:]
    for position, entry in enumerate(got):
        row = truth[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-3)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [c.token_id for c in entry.top] == row.topk(len(entry.top)).indices.tolist()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_random_checkpoint(
    family: str, request: pytest.FixtureRequest, start_server: Callable[..., Server]
) -> None:
    checkpoint: Path = request.getfixturevalue(family)
    reference = Reference(checkpoint)
    server = start_server(checkpoint)
    prompts = [reference.tokenizer.encode(prompt) for prompt in [*PROMPTS, "a", "x" * 200]]
    requests = [calls.generate_request(ids, max_tokens=40) for ids in prompts]
    for ids, reply in zip(prompts, server.together(requests), strict=True):
        assert calls.tokens_of(reply) == [reference.greedy(ids, 40)]
