"""Decoders that classify or only embed: bodies, last-token and token classifiers, against transformers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import VOCAB_SIZE, write_tokenizer
from support.decoders import VARIANTS, VOCAB, Variant, write
from support.encoding_service import EncodingServer
from support.exactness import find_library
from support.inspection_service import STEP_TOKENS, DecoderServer
from support.stack import Stack, random_prompts
from tokenizers import Tokenizer, processors

from salver.client import AsyncClient, FailedPrecondition
from salver.model.config_reader import read_spec
from salver.model.decoder_heads import decoder_variants
from salver.model.errors import CheckpointError

TOLERANCE = 1e-3
PADDING = 3
STEMS = sorted(
    {name.removesuffix("ForSequenceClassification") for name in decoder_variants() if "Sequence" in name}
)
TEXTS = ["the cat", "an inner thing, and then another one: the end of the line", "x", "the the the"]

pytestmark = pytest.mark.usefixtures("one_thread")


def variant(stem: str, head: str, **fields: Any) -> Variant:
    """The plain variant of the family's language model, with another head."""
    plain = VARIANTS.get(f"{stem} plain") or VARIANTS[f"{stem.removesuffix('Text')} plain"]
    return Variant(f"{stem}{head}", {**plain.config, **fields}, plain.attention)


GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "pad_token_id": None,
}  # fmt: skip


def make(stem: str, head: str, **fields: Any) -> Variant:
    return Variant(f"GPT2{head}", {**GPT2, **fields}) if stem == "GPT2" else variant(stem, head, **fields)


@torch.inference_mode()
def wanted(reference: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference(torch.tensor([ids])).logits[0]
    return found


def load(directory: Path) -> Stack:
    stack = Stack(directory)
    stack.head = stack.model.classify
    return stack


@pytest.mark.parametrize("stem", STEMS)
def test_the_last_token_that_is_no_padding_is_classified(stem: str, tmp_path: Path) -> None:
    reference = write(tmp_path, make(stem, "ForSequenceClassification", num_labels=3, pad_token_id=PADDING))
    stack = load(tmp_path)
    classifier = stack.model.spec.classifier
    assert classifier is not None and classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    (ids,) = random_prompts(VOCAB, [41])
    for inputs in (ids, [*ids[:20], 5, PADDING, PADDING], [PADDING] * 3):
        place = classifier.place(inputs)
        expected = wanted(reference, inputs)
        assert len(inputs) < 41 or expected.std() > 0.3, "scores this flat would show nothing"
        for chunk in (None, 7):
            assert float((stack.logits(inputs, chunk)[place] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("stem", ["Llama", "GPT2", "Qwen3", "Bloom"])
def test_every_token_is_classified(stem: str, tmp_path: Path) -> None:
    reference = write(tmp_path, make(stem, "ForTokenClassification", num_labels=3))
    (ids,) = random_prompts(VOCAB, [41])
    for chunk in (None, 7):
        found = load(tmp_path).logits(ids, chunk)
        assert float((found - wanted(reference, ids)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("stem", STEMS)
def test_bodies_load(stem: str, tmp_path: Path) -> None:
    """Saved alone, so without the prefix of the language model."""
    reference = write(tmp_path, make(stem, "Model"))
    stack = Stack(tmp_path)
    stack.head = lambda hidden: hidden
    (ids,) = random_prompts(VOCAB, [41])
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).last_hidden_state[0]
    assert float((stack.logits(ids, 7) - expected).abs().max()) < TOLERANCE


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, make("Llama", "ForSequenceClassification", num_labels=3))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, named in (
        ({"problem_type": "ranking"}, "problem_type"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"is_causal": False}, "is_causal"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=named):
            read_spec(tmp_path)


# ---- through the service ----


def write_served(directory: Path, stem: str, head: str, **fields: Any) -> Any:
    sizes = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    wide = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    reference = write(directory, make(stem, head, **sizes, **wide, **fields))
    write_tokenizer(directory, None)
    return reference


def serve(checkpoint: Path, *, native: bool = False) -> DecoderServer:
    library = find_library(checkpoint / "kernels") if native else None
    if native and library is None:
        pytest.skip("no native kernel here")
    return DecoderServer(checkpoint, library)


def run(server: EncodingServer, test: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with server.running() as client:
            await test(client)

    asyncio.run(asyncio.wait_for(inside(), 60))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


@pytest.mark.parametrize("native", [False, True])
def test_a_reward_model(tmp_path: Path, native: bool) -> None:
    """One label: its score raw or by a sigmoid, of texts and pairs beyond a step, alone or in a crowd."""
    reference = write_served(tmp_path, "Llama", "ForSequenceClassification", num_labels=1)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A </s> $B", special_tokens=[("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    server = serve(tmp_path, native=native)

    def raw(text: str, pair: str | None = None) -> float:
        return float(wanted(reference, list(server.tokenizer.encode_input(text, pair).token_ids))[0])

    long = "the line and an end then " * 4
    assert len(server.tokenizer.encode(long)) > 2 * STEP_TOKENS
    inputs: list[Any] = [*TEXTS, long, (long, TEXTS[0]), "ends so</s></s>"]
    expected = np.array([raw(*((item,) if isinstance(item, str) else item)) for item in inputs])
    assert expected.std() > 0.3

    async def test(client: AsyncClient) -> None:
        model = await client.get_model()
        assert model.tasks == ("embed", "rerank", "classify") and model.labels == ("LABEL_0",)
        together, *alone = await asyncio.gather(
            client.classify(inputs, activation="identity"),
            *(client.classify([item], activation="identity") for item in inputs),
            client.embed(TEXTS),
        )
        scores = [result.labels[0].score for result in together]
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
        assert scores == [result[0].labels[0].score for result in alone[:-1]]
        (usual,) = await client.classify(long)
        np.testing.assert_allclose(usual.labels[0].score, sigmoid(raw(long)), atol=TOLERANCE)
        ranked = await client.rerank(long, TEXTS, raw_scores=True)
        pairs = np.array([raw(long, text) for text in TEXTS])
        assert [r.index for r in ranked] == np.argsort(-pairs).tolist()
        np.testing.assert_allclose([r.score for r in ranked], sorted(pairs, reverse=True), atol=TOLERANCE)
        with pytest.raises(FailedPrecondition, match="it has EMBED, RERANK, CLASSIFY"):
            await client.generate("the")

    run(server, test)


def test_labels_and_their_activation(tmp_path: Path) -> None:
    labels = {"id2label": {0: "good", 1: "bad"}, "problem_type": "multi_label_classification"}
    reference = write_served(tmp_path, "Qwen2", "ForSequenceClassification", **labels)
    server = serve(tmp_path)

    async def test(client: AsyncClient) -> None:
        for text, result in zip(TEXTS, await client.classify(TEXTS), strict=True):
            expected = sigmoid(wanted(reference, server.tokenizer.encode(text)))
            found = {label.label: label.score for label in result.labels}
            np.testing.assert_allclose([found["good"], found["bad"]], expected, atol=TOLERANCE)

    run(server, test)


def test_tokens_are_labelled_with_their_offsets(tmp_path: Path) -> None:
    reference = write_served(
        tmp_path, "Qwen3", "ForTokenClassification", id2label={0: "O", 1: "B-X", 2: "I-X"}
    )
    server = serve(tmp_path)
    text = "the cat " * 20  # several steps

    async def test(client: AsyncClient) -> None:
        assert (await client.get_model()).tasks == ("embed", "classify_tokens")
        (result,) = await client.classify_tokens(text, include_outside=True)
        tokens = server.tokenizer.encode_with_offsets(text)
        scores = wanted(reference, [token for token, _, _ in tokens]).softmax(-1)
        assert [(s.start, s.end) for s in result.spans] == [(start, end) for _, start, end in tokens]
        assert [s.label for s in result.spans] == [("O", "B-X", "I-X")[i] for i in scores.argmax(-1).tolist()]
        np.testing.assert_allclose([s.score for s in result.spans], scores.amax(-1), atol=TOLERANCE)

    run(server, test)


def test_a_body_in_a_sentence_transformers_directory(tmp_path: Path) -> None:
    """The last token's state, normalized; queries after an instruction."""
    reference = write_served(tmp_path, "Qwen3", "Model")
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True, "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "an order: the ", "document": ""}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    server = serve(tmp_path)

    def expected(text: str) -> Any:
        with torch.inference_mode():
            hidden = reference(torch.tensor([server.tokenizer.encode(text)])).last_hidden_state[0]
        vector = hidden[-1].numpy()
        return vector / np.linalg.norm(vector)

    async def test(client: AsyncClient) -> None:
        assert (await client.get_model()).tasks == ("embed",)
        for prompt_name, prefix in ((None, ""), ("query", "an order: the ")):
            options: Any = {} if prompt_name is None else {"prompt_name": prompt_name}
            for text, found in zip(TEXTS, await client.embed(TEXTS, **options), strict=True):
                np.testing.assert_allclose(found.values, expected(prefix + text), atol=1e-4)
        with pytest.raises(FailedPrecondition, match="it has EMBED"):
            await client.classify("the")

    run(server, test)
