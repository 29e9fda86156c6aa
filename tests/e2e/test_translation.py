"""Translation over gRPC: an encoder-decoder with the tokenizers that Marian's checkpoints bring along."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support import calls
from support.seq2seq import CONTEXT, write_translator
from support.serving import Server

from salver.model.tokenizer import Tokenizer
from salver.v1 import generation_pb2, model_pb2

TEXTS = ["the cat sat on a mat.", "a dog", "the dog sat on the cat, the cat on the mat, x", "a dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("translator")
    write_translator(directory)
    return directory


@pytest.fixture(scope="module")
def server(start_module_server: Callable[..., Any], checkpoint: Path) -> Server:
    started: Server = start_module_server(
        str(checkpoint), "--threads", "1", "--dtype", "float32", "--no-deadline-admission"
    )
    return started


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    from transformers import MarianMTModel

    return MarianMTModel.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    """What transformers gives, without the start token."""
    tensor = torch.tensor([ids])
    mask = torch.ones_like(tensor)
    found = reference.generate(
        tensor, attention_mask=mask, max_new_tokens=count, num_beams=1, do_sample=False
    )
    return [int(token) for token in found[0, 1:]]


def test_as_transformers_translates(server: Server, reference: Any, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[-1] == 0  # the end of a source is told
        reply = server.generate(text, max_tokens=20)
        (completion,) = reply.completions
        assert list(completion.token_ids) == greedy(reference, ids, 20)
        assert completion.token_ids[-1] == 0, "the last token of so many is set"
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert not completion.text.startswith(" ")
        assert (list(reply.prompt_token_ids), reply.usage.prompt_tokens) == (ids, len(ids))
        assert list(calls.tokens_of(server.generate(ids, max_tokens=20))[0]) == list(completion.token_ids)


def test_a_crowd_streams_the_same(server: Server) -> None:
    alone = [server.tokens(text, max_tokens=30) for text in TEXTS]
    crowd = [calls.generate_request(text, max_tokens=30) for text in TEXTS * 4]
    assert [calls.tokens_of(reply)[0] for reply in server.together(crowd)] == alone * 4
    messages = list(server.stream(TEXTS[0], max_tokens=30))
    streamed = [token for message in messages for c in message.completions for token in c.token_ids]
    assert streamed == alone[0]
    whole = server.generate(TEXTS[0], max_tokens=30).completions[0].text
    assert "".join(c.text for message in messages for c in message.completions) == whole
    server.wait_idle()


def test_samples_share_a_source(server: Server) -> None:
    sampled = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    reply = server.generate(TEXTS[0], n=3, **sampled)
    first = calls.tokens_of(reply)
    assert len({tuple(tokens) for tokens in first}) > 1
    assert calls.tokens_of(server.generate(TEXTS[0], n=3, **sampled)) == first
    server.wait_idle()


def test_a_language_is_told_in_the_source(server: Server, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint)
    told = server.generate("a dog", max_tokens=8, target_language="fr")
    assert told.prompt_token_ids[0] == tokenizer.token_to_id(">>fr<<")
    spelled = server.generate(">>fr<< a dog", max_tokens=8)
    assert list(spelled.prompt_token_ids) == list(told.prompt_token_ids)
    with pytest.raises(grpc.RpcError) as error:
        server.generate("a dog", target_language="xx")
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert calls.read_failure(error.value).fields == ["target_language"]


def test_score_is_of_the_output(server: Server, reference: Any, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint)
    output = tokenizer.encode_output("die katze sa auf.")
    assert output != tokenizer.encode("die katze sa auf.")[:-1], "the other side has its own pieces"
    request = generation_pb2.ScoreRequest(
        inputs=[
            generation_pb2.ScoreInput(
                context=calls.prompt_of(TEXTS[0]), continuation=calls.prompt_of("die katze sa auf.")
            )
        ]
    )
    (result,) = server.generation.Score(request, timeout=calls.TIMEOUT).results
    assert [item.token_id for item in result.logprobs] == output
    start = reference.config.decoder_start_token_id
    with torch.inference_mode():
        logits = reference(
            input_ids=torch.tensor([tokenizer.encode(TEXTS[0])]),
            decoder_input_ids=torch.tensor([[start, *output[:-1]]]),
        ).logits[0]
    expected = logits.log_softmax(-1)[range(len(output)), output]
    found = torch.tensor([item.logprob for item in result.logprobs])
    assert float((found - expected).abs().max()) < 2e-3


def test_a_cancelled_translation_frees_everything(server: Server) -> None:
    stream = server.stream(TEXTS[2], max_tokens=100, ignore_eos=True)
    next(stream)
    stream.cancel()
    server.wait_idle()  # not a block is owned, the source's neither


def test_resumed_where_it_was_cut(server: Server) -> None:
    whole = server.generate(TEXTS[0], max_tokens=20)
    tokens = list(whole.completions[0].token_ids)
    request = calls.generate_request(TEXTS[0], max_tokens=20)
    request.resume.numerics_id = whole.numerics_id
    request.resume.prompt_token_ids.extend(whole.prompt_token_ids)
    request.resume.samples.add(index=0, token_ids=tokens[:6])
    reply = server.generation.Generate(request, timeout=calls.TIMEOUT)
    assert list(reply.completions[0].token_ids) == tokens[6:]


def test_what_does_not_fit_is_refused_with_numbers(server: Server) -> None:
    with pytest.raises(grpc.RpcError, match=f"the encoder reads at most {CONTEXT}") as error:
        server.generate([5] * (CONTEXT + 1))
    assert error.value.code() is grpc.StatusCode.OUT_OF_RANGE
    with pytest.raises(grpc.RpcError, match=f"has room for {CONTEXT - 1}") as error:
        server.generate([5] * 10, max_tokens=CONTEXT)
    assert error.value.code() is grpc.StatusCode.OUT_OF_RANGE


def test_what_it_is_and_is_not(server: Server) -> None:
    model = server.models.GetModel(model_pb2.GetModelRequest(), timeout=10).model
    assert [model_pb2.Task.Name(task) for task in model.tasks] == ["TASK_GENERATE", "TASK_SCORE"]
    with pytest.raises(grpc.RpcError, match="no chat template") as error:
        server.generation.Chat(calls.chat_request((generation_pb2.ROLE_USER, "hi")), timeout=10)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError) as error:
        server.generate("a dog", prompt_top_k=1)
    assert calls.read_failure(error.value).fields == ["logprobs.prompt_top_k"]


def test_many_at_once_and_some_of_them_cancelled(server: Server) -> None:
    """The rest is as alone."""
    alone = server.tokens(TEXTS[2], max_tokens=40)
    streams = [server.stream(TEXTS[i % 3], max_tokens=60, temperature=1.0, seed=i + 1) for i in range(12)]
    threads = [threading.Thread(target=stream.cancel) for stream in streams]
    kept = server.generation.Generate.future(
        calls.generate_request(TEXTS[2], max_tokens=40), timeout=calls.TIMEOUT
    )
    for thread in threads:
        thread.start()
    assert calls.tokens_of(kept.result())[0] == alone
    for thread in threads:
        thread.join()
    server.wait_idle()
