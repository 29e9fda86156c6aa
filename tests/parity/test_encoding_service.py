"""Every task of EncodingService over gRPC against transformers, or against its definition."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.test_encoders import native_library
from support.encoders import VOCAB, Oracle, write_encoder
from support.encoding_service import EncodingServer

from salver.client import AsyncClient, FailedPrecondition, InvalidArgument, OutOfRange

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused]"),
    *"the a teacher student gave book to who has read it in paris london anna bob likes and wrote".split(),
    *("was", "##s", "##ing", "##er", "play", "sing", "long", "short", ".", ",", "?", "!", "'", "not", "cat"),
    *(chr(c) for c in range(ord("a"), ord("z") + 1) if chr(c) != "a"),
]
TEXTS = [
    "Anna gave the book to Bob in Paris.",
    "who has it?",
    "The student likes singing and playing, the teacher was not short!",
    "x",
]
CONTEXT = (
    "The teacher gave the book to the student in London. "
    "Anna and Bob was singing long, Bob likes the players. "
    "The student read it and wrote to the teacher in Paris. "
) * 2


def write(directory: Path, architecture: str, **changes: Any) -> Path:
    """A random checkpoint with a WordPiece vocabulary of a few words, in the old vocab.txt."""
    write_encoder(directory, architecture, **changes)
    words = WORDS + [f"[unused{i}]" for i in range(VOCAB - len(WORDS))]
    assert len(set(words)) == VOCAB
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def reference_tokenizer(checkpoint: Path) -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab=str(checkpoint / "vocab.txt"), do_lower_case=True)


def run(server: EncodingServer, test: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with server.running() as client:
            await test(client)

    asyncio.run(asyncio.wait_for(inside(), 60))


def logits(checkpoint: Path, architecture: str, text: str, pair: str | None = None) -> np.ndarray[Any, Any]:
    tokens = reference_tokenizer(checkpoint)(text, pair)
    found = Oracle(checkpoint, architecture)(tokens["input_ids"], tokens["token_type_ids"])
    return found.double().numpy()


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-4)


def test_vocabulary_file_tokenizes_as_transformers_does(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "BertModel")
    ours, theirs = EncodingServer(checkpoint).tokenizer, reference_tokenizer(checkpoint)
    for text in [*TEXTS, CONTEXT, "[MASK] naïve 漢字 the\tbook[SEP]"]:
        for pair in (None, "who has it?"):
            found, wanted = ours.encode_input(text, pair), theirs(text, pair)
            assert list(found.token_ids) == wanted["input_ids"]
            assert list(found.segments) == wanted["token_type_ids"]
    for limit in (5, 9, 12, 17, 40):
        for first, second in [(TEXTS[2], TEXTS[0]), (TEXTS[1], TEXTS[2]), (TEXTS[2], TEXTS[2])]:
            short = ours.encode_input(first, second).shortened(limit)
            wanted = theirs(first, second, truncation="longest_first", max_length=limit)
            assert list(short.token_ids) == wanted["input_ids"]
        short = ours.encode_input(TEXTS[2]).shortened(limit)
        assert list(short.token_ids) == theirs(TEXTS[2], truncation=True, max_length=limit)["input_ids"]


def test_embed(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "BertModel")
    hidden = [logits(checkpoint, "BertModel", text) for text in TEXTS]

    async def test(client: AsyncClient) -> None:
        for pooling, reduce in (
            (None, lambda h: h.mean(0)),
            ("mean", lambda h: h.mean(0)),
            ("cls", lambda h: h[0]),
            ("max", lambda h: h.max(0)),
            ("last_token", lambda h: h[-1]),
        ):
            options: Any = {} if pooling is None else {"pooling": pooling}
            for found, h in zip(await client.embed(TEXTS, **options), hidden, strict=True):
                close(found.values, reduce(h))
                assert found.num_tokens == len(h) and found.truncated_tokens == 0
        short = await client.embed(TEXTS, dimensions=7, normalize=True)
        for found, h in zip(short, hidden, strict=True):
            vector = h.mean(0)[:7]
            close(found.values, vector / np.linalg.norm(vector))
        each = await client.embed(TEXTS, per_token=True)
        for text, found, h in zip(TEXTS, each, hidden, strict=True):
            close([token.values for token in found.tokens], h)
            assert found.values == ()
            pieces = [text[t.start : t.end].lower() for t in found.tokens]
            assert [p for p in pieces if p] and all(
                t.token.decode().removeprefix("##") == p
                for t, p in zip(found.tokens, pieces, strict=True)
                if p
            )
        # A crowd of single calls gives what one call of all gave.
        alone = await asyncio.gather(*(client.embed(text) for text in TEXTS * 5))
        for (found,), wanted in zip(alone, (await client.embed(TEXTS)) * 5, strict=True):
            close(found.values, wanted.values)

    run(EncodingServer(checkpoint), test)


def test_sentence_transformers_modules(tmp_path: Path) -> None:
    """Two poolings side by side, a dense map, normalization, prompts, a limit of its own."""
    checkpoint = write(tmp_path, "BertModel")
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
        {"type": "sentence_transformers.models.Normalize", "path": "3_Normalize"},
    ]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 48,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": True,
    }
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (checkpoint / "2_Dense").mkdir()
    dense = {"in_features": 96, "out_features": 20, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    (checkpoint / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weight, bias = torch.randn(20, 96) / 5, torch.randn(20)
    torch.save({"linear.weight": weight, "linear.bias": bias}, checkpoint / "2_Dense" / "pytorch_model.bin")
    (checkpoint / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 14, "do_lower_case": True})
    )
    prompts = {"prompts": {"query": "who has ", "plain": ""}, "default_prompt_name": "plain"}
    (checkpoint / "config_sentence_transformers.json").write_text(json.dumps(prompts))

    def expected(text: str) -> Any:
        ids = reference_tokenizer(checkpoint)(text.lower(), truncation=True, max_length=14)["input_ids"]
        h = Oracle(checkpoint, "BertModel")(ids).numpy()
        vector = np.tanh(weight.numpy() @ np.concatenate((h[0], h.mean(0))) + bias.numpy())
        return vector / np.linalg.norm(vector)

    async def test(client: AsyncClient) -> None:
        model = await client.get_model()
        assert model.tasks == ("embed",) and model.embedding_dimensions == 20
        (found,) = await client.embed("Anna likes it")
        close(found.values, expected("Anna likes it"))
        (found,) = await client.embed("Anna likes it", prompt_name="query")
        close(found.values, expected("who has Anna likes it"))
        (found,) = await client.embed(TEXTS[2], truncate=True)
        close(found.values, expected(TEXTS[2]))
        assert found.num_tokens == 14 and found.truncated_tokens > 0
        with pytest.raises(OutOfRange, match="at most 14"):
            await client.embed(TEXTS[2])
        with pytest.raises(InvalidArgument, match="prompt_name"):
            await client.embed("x", prompt_name="passage")
        with pytest.raises(InvalidArgument, match="pooling"):
            await client.embed("x", pooling="cls")

    run(EncodingServer(checkpoint), test)


def test_classify_single_pair_and_multi_label(tmp_path: Path) -> None:
    labels = {"id2label": {"0": "good", "1": "bad", "2": "ugly"}}
    name = "BertForSequenceClassification"
    checkpoint = write(tmp_path, name, **labels)

    async def single(client: AsyncClient) -> None:
        assert (await client.get_model()).labels == ("good", "bad", "ugly")
        inputs: list[Any] = [TEXTS[0], (TEXTS[0], TEXTS[2]), TEXTS[3]]
        for activation in (None, "sigmoid", "identity"):
            options: Any = {} if activation is None else {"activation": activation}
            found = await client.classify(inputs, **options)
            for item, result in zip(inputs, found, strict=True):
                texts = (item,) if isinstance(item, str) else item
                wanted = logits(checkpoint, name, *texts)
                order = np.argsort(-wanted)
                scores = {"sigmoid": 1 / (1 + np.exp(-wanted)), "identity": wanted}.get(activation or "")
                scores = softmax(wanted) if scores is None else scores
                assert [label.label for label in result.labels] == [("good", "bad", "ugly")[i] for i in order]
                close([label.score for label in result.labels], scores[order])
        (best,) = await client.classify("x", top_k=1)
        assert len(best.labels) == 1
        with pytest.raises(FailedPrecondition, match="it has EMBED, CLASSIFY") as caught:
            await client.rerank("a", ["b"])
        assert caught.value.reason == "TASK_NOT_SUPPORTED"

    run(EncodingServer(checkpoint), single)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "problem_type": "multi_label_classification"})
    )

    async def multi(client: AsyncClient) -> None:
        (result,) = await client.classify(TEXTS[2])
        close(
            sorted(s.score for s in result.labels),
            sorted(1 / (1 + np.exp(-logits(checkpoint, name, TEXTS[2])))),
        )

    run(EncodingServer(checkpoint), multi)


def test_pairs_that_the_tokenizer_does_not_part_are_refused(tmp_path: Path) -> None:
    from tokenizers import processors

    def unparted(name: str, **changes: Any) -> EncodingServer:
        checkpoint = write(tmp_path / name, name, **changes)
        backend = reference_tokenizer(checkpoint).backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        backend.save(str(checkpoint / "tokenizer.json"))
        return EncodingServer(checkpoint)

    async def test(client: AsyncClient) -> None:
        with pytest.raises(InvalidArgument, match=r"inputs\[1\]\.pair: 'tiny' reads single texts"):
            await client.classify(["x", ("the", "book")])
        with pytest.raises(InvalidArgument, match="pair: 'tiny' reads single texts"):
            await client.get_attention("the", pair="book")
        assert len((await client.classify("the book"))[0].labels) == 3

    async def rank(client: AsyncClient) -> None:
        with pytest.raises(InvalidArgument, match="documents: 'tiny' reads single texts"):
            await client.rerank("who", ["the book"])

    async def ask(client: AsyncClient) -> None:
        with pytest.raises(InvalidArgument, match="context: 'tiny' reads single texts"):
            await client.extract_answer("who", "the book")

    run(unparted("BertForSequenceClassification"), test)
    run(unparted("BertForSequenceClassification", num_labels=1), rank)
    run(unparted("BertForQuestionAnswering"), ask)


def test_rerank(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    checkpoint = write(tmp_path, name, num_labels=1)
    raw = np.array([logits(checkpoint, name, "who has it?", text)[0] for text in TEXTS])
    order = np.argsort(-raw)

    async def test(client: AsyncClient) -> None:
        found = await client.rerank("who has it?", TEXTS, return_documents=True)
        assert [r.index for r in found] == order.tolist() and [r.document for r in found] == [
            TEXTS[i] for i in order
        ]
        close([r.score for r in found], 1 / (1 + np.exp(-raw[order])))
        best = await client.rerank("who has it?", TEXTS, top_n=2, raw_scores=True)
        close([r.score for r in best], raw[order[:2]])
        with pytest.raises(InvalidArgument, match="documents: must not be empty"):
            await client.rerank("who", [])
        with pytest.raises(InvalidArgument, match="documents: are 10000; at most 64"):
            await client.rerank("who", ["x"] * 10_000)
        long = " ".join(["the book"] * 60)
        with pytest.raises(OutOfRange, match=r"documents\[1\] is 1\d\d tokens"):
            await client.rerank("who", ["x", long])
        (_, cut) = sorted(await client.rerank("who", ["x", long], truncate=True), key=lambda r: r.index)
        assert cut.truncated_tokens > 50

    run(EncodingServer(checkpoint), test)


def test_classify_tokens_as_transformers_pipeline_does(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, pipeline

    labels = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    wide = {"initializer_range": 0.5}  # or one label wins everywhere
    checkpoint = write(tmp_path, "BertForTokenClassification", id2label=labels, num_labels=5, **wide)
    model = AutoModelForTokenClassification.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = reference_tokenizer(checkpoint)

    async def test(client: AsyncClient) -> None:
        kinds = set()
        for aggregation in ("none", "simple", "first", "average", "max"):
            reference = pipeline(
                "token-classification", model, tokenizer=tokenizer, aggregation_strategy=aggregation
            )
            found = await client.classify_tokens([*TEXTS, CONTEXT[:120]], aggregation=aggregation)
            for text, result in zip([*TEXTS, CONTEXT[:120]], found, strict=True):
                wanted = reference(text)
                key = "entity" if aggregation == "none" else "entity_group"
                assert [(s.label, s.start, s.end) for s in result.spans] == [
                    (w[key], w["start"], w["end"]) for w in wanted
                ]
                close([s.score for s in result.spans], [w["score"] for w in wanted])
                assert all(s.text == text[s.start : s.end] for s in result.spans)
                kinds |= {s.label for s in result.spans}
        assert len(kinds) >= 4
        (plain,) = await client.classify_tokens(TEXTS[0], include_outside=True)
        assert len(plain.spans) == plain.num_tokens - 2

    run(EncodingServer(checkpoint), test)


def test_fill_mask(tmp_path: Path) -> None:
    name = "BertForMaskedLM"
    checkpoint = write(tmp_path, name)
    text = "Anna gave the [MASK] to Bob in [MASK]."

    async def test(client: AsyncClient) -> None:
        probabilities = softmax(logits(checkpoint, name, text))
        ids = reference_tokenizer(checkpoint)(text)["input_ids"]
        places = [i for i, token in enumerate(ids) if WORDS[token:] and WORDS[token] == "[MASK]"]
        for top_k in (None, 7):
            options: Any = {} if top_k is None else {"top_k": top_k}
            (masks,) = await client.fill_mask(text, **options)
            assert [text[m.start : m.end] for m in masks] == ["[MASK]", "[MASK]"]
            for mask, place in zip(masks, places, strict=True):
                order = np.argsort(-probabilities[place])[: top_k or 5]
                assert [c.token_id for c in mask.candidates] == order.tolist()
                close([c.probability for c in mask.candidates], probabilities[place][order])
        (masks,) = await client.fill_mask(text, targets=["paris", "book"])
        for mask, place in zip(masks, places, strict=True):
            assert {c.token for c in mask.candidates} == {"paris", "book"}
            for candidate in mask.candidates:
                close(candidate.probability, probabilities[place][WORDS.index(candidate.token)])
        with pytest.raises(InvalidArgument, match=r"inputs\[1\]: holds no mask token \(\[MASK\]\)"):
            await client.fill_mask([text, "the book"])
        with pytest.raises(InvalidArgument, match=r"targets\[0\]"):
            await client.fill_mask(text, targets=["bookshelf"])

    run(EncodingServer(checkpoint), test)


def test_a_tokenizer_without_a_mask_token(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "BertForMaskedLM")
    vocabulary = checkpoint / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("[MASK]", "[gone]"))
    settings = {"tokenizer_class": "BertTokenizer"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))

    async def test(client: AsyncClient) -> None:
        for text in ("Anna gave the [MASK] to Bob", "the book"):
            with pytest.raises(InvalidArgument, match=r"inputs\[0\]: the tokenizer has no mask token"):
                await client.fill_mask(text)

    run(EncodingServer(checkpoint), test)


def test_extract_answer(tmp_path: Path) -> None:
    """Against every pair of start and end of a context that one window holds, and by windows."""
    name = "BertForQuestionAnswering"
    checkpoint = write(tmp_path, name)
    question, context = "who has the book?", CONTEXT[:180]

    async def test(client: AsyncClient) -> None:
        tokens = reference_tokenizer(checkpoint)(question, context, return_offsets_mapping=True)
        kinds, offsets = tokens.sequence_ids(), tokens["offset_mapping"]
        scores = logits(checkpoint, name, question, context)
        scores[[kind != 1 and i > 0 for i, kind in enumerate(kinds)]] = -1e9
        p = softmax(scores.T)
        spans: dict[tuple[int, int], float] = {}
        for i in range(1, len(kinds)):
            for j in range(i, min(i + 15, len(kinds))):
                if kinds[i] == kinds[j] == 1:
                    span = (offsets[i][0], offsets[j][1])
                    spans[span] = max(spans.get(span, 0), float(p[0][i] * p[1][j]))
        best = sorted(spans.items(), key=lambda item: -item[1])[:3]
        found = await client.extract_answer(question, context, top_k=3)
        close([a.score for a in found], [score for _, score in best])
        assert [(a.start, a.end) for a in found] == [span for span, _ in best]
        assert all(a.text == context[a.start : a.end] for a in found)
        everything = await client.extract_answer(question, context, top_k=200, allow_no_answer=True)
        (nothing,) = [a for a in everything if a.no_answer]
        close(nothing.score, p[0][0] * p[1][0])
        assert (nothing.text, nothing.start, nothing.end) == ("", 0, 0)
        long = "é " + CONTEXT * 3
        whole = {"truncation": "only_second", "max_length": 64, "stride": 20}
        windows = reference_tokenizer(checkpoint)(
            question, long, return_overflowing_tokens=True, return_offsets_mapping=True, **whole
        )
        assert len(windows["input_ids"]) > 5
        answers: dict[tuple[int, int], float] = {}
        for index, ids in enumerate(windows["input_ids"]):
            kinds, offsets = windows.sequence_ids(index), windows["offset_mapping"][index]
            scores = Oracle(checkpoint, name)(ids, windows["token_type_ids"][index]).double().numpy()
            scores[[kind != 1 and i > 0 for i, kind in enumerate(kinds)]] = -1e9
            p = softmax(scores.T)
            for i, j in itertools.product(range(1, len(ids)), repeat=2):
                if kinds[i] == kinds[j] == 1 and 0 <= j - i < 15:
                    span = (offsets[i][0], offsets[j][1])
                    answers[span] = max(answers.get(span, 0), float(p[0][i] * p[1][j]))
        wanted = sorted(answers.items(), key=lambda item: -item[1])[:4]
        found = await client.extract_answer(question, long, stride=20, top_k=4)
        close([a.score for a in found], [score for _, score in wanted])
        assert [(a.start, a.end) for a in found] == [span for span, _ in wanted]
        assert all(long[a.start : a.end] == a.text for a in found)
        with pytest.raises(OutOfRange, match="stride is 60"):
            await client.extract_answer(question, CONTEXT * 3, stride=60)
        with pytest.raises(InvalidArgument, match="context: must not be empty"):
            await client.extract_answer(question, "  ")

    run(EncodingServer(checkpoint), test)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ],
)
def test_strangers_of_every_task_change_no_bit(
    tmp_path: Path, cache_dir: Path, architecture: str, native: bool
) -> None:
    """Whatever the checkpoint can do, asked alone, and in crowds of all of it in any order."""
    library = native_library(cache_dir) if native else None
    labels = {"num_labels": 1} if "Sequence" in architecture else {}
    checkpoint = write(tmp_path / "checkpoint", architecture, num_attention_heads=3, **labels)
    head: dict[str, Callable[[AsyncClient], Any]] = {
        "BertForSequenceClassification": lambda c: c.rerank(TEXTS[1], [*TEXTS, CONTEXT[:90]]),
        "BertForMaskedLM": lambda c: c.fill_mask("Anna gave the [MASK] to [MASK]."),
        "BertForTokenClassification": lambda c: c.classify_tokens(TEXTS, aggregation="simple"),
        "BertForQuestionAnswering": lambda c: c.extract_answer(TEXTS[1], CONTEXT, top_k=3),
    }
    calls: list[Callable[[AsyncClient], Any]] = [
        lambda c: c.embed(TEXTS),
        lambda c: c.embed(CONTEXT[:200], pooling="max"),
        lambda c: c.embed(TEXTS[2:], per_token=True),
        lambda c: c.get_attention(TEXTS[0], top_k=5),
        head[architecture],
    ]
    if "Sequence" in architecture:
        calls.append(lambda c: c.classify([TEXTS[0], (TEXTS[2], TEXTS[1])], activation="identity"))

    async def test(client: AsyncClient) -> None:
        alone = [await call(client) for call in calls]
        draw = random.Random(0)
        for _ in range(3):
            crowd = draw.choices(range(len(calls)), k=12)
            found = await asyncio.gather(*(calls[i](client) for i in crowd))
            assert all(answer == alone[i] for answer, i in zip(found, crowd, strict=True))

    run(EncodingServer(checkpoint, library), test)
