"""GetAttention over gRPC against transformers' output_attentions, and against its definitions."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from parity.test_encoding_service import write
from parity.test_inspection_service import PROMPT, run
from support.checkpoints import VOCAB_SIZE, write_tiny_gpt2, write_tiny_llama, write_tokenizer
from support.encoding_service import EncodingServer
from support.exactness import find_library
from support.inspection_service import DecoderServer
from support.parity import write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from salver.client import AsyncClient, Attention, InvalidArgument, OutOfRange
from salver.client.cli import main

TEXT = "The teacher gave the book to the student in London, Anna likes singing."


SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
# What else there is to a score: a bias by position, a cap, a window, sinks.
DECODERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gemma2": {**SIZES, "attn_logit_softcapping": 2.0, "sliding_window": 9},
    "gpt_oss": {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 9},
}


def oracle(checkpoint: Path, token_ids: Any, segments: list[int] | None = None) -> Any:
    """[layers, heads, n, n]"""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        kinds = {} if segments is None else {"token_type_ids": torch.tensor([segments])}
        found = model.eval()(torch.tensor([token_ids]), **kinds, output_attentions=True).attentions
    return torch.cat(found).numpy()


def matrices(found: Attention) -> Any:
    """[layers and heads, n, n]"""
    return np.array([matrix.weights for matrix in found.matrices])


def ids_of(found: Attention) -> list[int]:
    return [token_id for unit in found.units for token_id in unit.token_ids]


def make(kind: str, directory: Path) -> EncodingServer:
    if kind in ("llama", "native"):
        library = find_library(directory.parent / "kernels") if kind == "native" else None
        if kind == "native" and library is None:
            pytest.skip("no native kernel here")
        return DecoderServer(write_tiny_llama(directory), library)
    if kind == "gpt2":
        return DecoderServer(write_tiny_gpt2(directory))
    if kind in DECODERS:
        config = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, **DECODERS[kind]}
        made = AutoConfig.for_model(kind, **config)
        write_checkpoint(directory, type(AutoModelForCausalLM.from_config(made)), made)
        write_tokenizer(directory, None)
        return DecoderServer(directory)
    return EncodingServer(write(directory, kind))


ENCODERS = ("BertModel", "MPNetModel", "AlbertModel", "ModernBertModel", "DebertaV2Model")
KINDS = ("llama", "native", "gpt2", *DECODERS, *ENCODERS)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    server = make(kind, tmp_path)
    text = PROMPT if isinstance(server, DecoderServer) else TEXT

    async def test(client: AsyncClient) -> None:
        found = await client.get_attention(text)
        wanted = oracle(tmp_path, ids_of(found))
        layers, heads, length, _ = wanted.shape
        assert (found.num_layers, found.num_heads) == (layers, heads)
        assert [(m.layer, m.head) for m in found.matrices] == [
            (layer, head) for layer in range(layers) for head in range(heads)
        ]
        raw = matrices(found).reshape(wanted.shape)
        np.testing.assert_allclose(raw, wanted, atol=1e-4)
        if kind != "gpt_oss":
            np.testing.assert_allclose(raw.sum(-1), 1, atol=1e-5)
        assert wanted.std() > 0.02  # not all alike
        some = await client.get_attention(text, layers=[1], heads=[2, 0])
        assert [(m.layer, m.head) for m in some.matrices] == [(1, 0), (1, 2)]
        np.testing.assert_array_equal(matrices(some), raw[1, [0, 2]])
        mean = matrices(await client.get_attention(text, view="head_mean"))
        np.testing.assert_allclose(mean, wanted.mean(1), atol=1e-4)
        rolled = matrices(await client.get_attention(text, view="rollout", layers=[layers - 1]))
        expected = np.eye(length)
        for layer in wanted.astype(np.float64):
            mixed = layer.mean(0) + np.eye(length)
            expected = mixed / mixed.sum(-1, keepdims=True) @ expected
        np.testing.assert_allclose(rolled[0], expected, atol=1e-4)
        links = await client.get_attention(text, layers=[0], heads=[1], top_k=3)
        for query in range(length):
            ours = [link for link in links.matrices[0].links if link.query == query]
            order = np.argsort(-raw[0, 1, query], kind="stable")[:3]
            assert [link.key for link in ours] == [k for k in order if raw[0, 1, query, k] > 0]
            assert all(link.weight == raw[0, 1, query, link.key] for link in ours)

    run(server, test)


@pytest.mark.parametrize("kind", ["llama", "BertModel"])
def test_words(kind: str, tmp_path: Path) -> None:
    """The mean over a word's queries and the sum over its keys, of the words that one reads."""
    server = make(kind, tmp_path)

    async def test(client: AsyncClient) -> None:
        plain, words = await client.get_attention(TEXT), await client.get_attention(TEXT, merge_words=True)
        texts = [TEXT[unit.start : unit.end].strip() for unit in words.units]
        spelled = TEXT.replace(",", " ,").replace(".", " .").split()
        assert [text for text in texts if text] == spelled
        assert ids_of(words) == ids_of(plain)
        bounds = np.cumsum([0, *(len(unit.token_ids) for unit in words.units)])
        groups = [range(a, b) for a, b in itertools.pairwise(bounds)]
        assert max(map(len, groups)) > 1
        before, after = matrices(plain), matrices(words)
        for i, rows in enumerate(groups):
            for j, keys in enumerate(groups):
                expected = before[:, rows][:, :, keys].sum(-1).mean(-1)
                np.testing.assert_allclose(after[:, i, j], expected, atol=1e-5)
        np.testing.assert_allclose(after.sum(-1), 1, atol=1e-5)

    run(server, test)


def test_a_pair_is_read_as_one(tmp_path: Path) -> None:
    server = make("BertModel", tmp_path)
    other = "the student read"

    async def test(client: AsyncClient) -> None:
        found = await client.get_attention(TEXT, pair=other)
        encoded = server.tokenizer.encode_input(TEXT, other)
        assert ids_of(found) == list(encoded.token_ids) and 1 in encoded.segments
        wanted = oracle(tmp_path, ids_of(found), list(encoded.segments))
        raw = matrices(found).reshape(wanted.shape)
        np.testing.assert_allclose(raw, wanted, atol=1e-4)
        assert abs(raw - oracle(tmp_path, ids_of(found))).max() > 1e-3  # the segments count
        words = (await client.get_attention(TEXT, pair=other, merge_words=True)).units
        texts = [other[unit.start : unit.end] for unit in words if unit.text == 1]
        assert [text for text in texts if text] == other.split()
        with pytest.raises(InvalidArgument, match="pair: needs a text beside it"):
            await client.get_attention([5, 6], pair=other)

    run(server, test)


@pytest.mark.parametrize("kind", ["llama", "native", "BertModel"])
def test_neighbours_are_left_alone(kind: str, tmp_path: Path) -> None:
    """Among embeddings (and a stream of tokens) everybody gets what they get alone."""
    server = make(kind, tmp_path)

    async def test(client: AsyncClient) -> None:
        texts = [TEXT, PROMPT[:20], "x", "the book to the student"]
        attention = await client.get_attention(TEXT)
        vectors = await client.embed(texts)
        asked: list[Any] = [client.get_attention(TEXT), client.embed(texts), client.get_attention(TEXT)]
        decoder = isinstance(server, DecoderServer)
        if decoder:
            options: Any = {"max_tokens": 12, "seed": 3, "ignore_eos": True}
            alone = await client.generate(TEXT, **options)
            asked.append(client.generate(TEXT, **options))
        found = await asyncio.gather(*asked)
        assert found[0] == found[2] == attention and found[1] == vectors
        if decoder:
            assert found[3].completions == alone.completions

    run(server, test)


def test_what_is_refused(tmp_path: Path) -> None:
    server = make("llama", tmp_path)

    async def test(client: AsyncClient) -> None:
        cases: list[tuple[str, dict[str, Any]]] = [
            (r"layers\[0\]: 2 must be below 2", {"layers": [2]}),
            (r"heads\[1\]: 4 must be below 4", {"heads": [0, 4]}),
            ("heads: cannot be chosen for a rollout", {"heads": [0], "view": "rollout"}),
            ("top_k", {"top_k": 0}),
        ]
        for match, options in cases:
            with pytest.raises(InvalidArgument, match=match):
                await client.get_attention("the", **options)
        with pytest.raises(InvalidArgument, match="pair: 'tiny' is a decoder, which reads one text"):
            await client.get_attention("the", pair="the")
        with pytest.raises(InvalidArgument, match="merge_words: needs a text"):
            await client.get_attention([5, 6], merge_words=True)
        with pytest.raises(OutOfRange, match=r"500 tokens in 2 layers and 4 heads .* at most 175"):
            await client.get_attention([5] * 500)
        assert len((await client.get_attention([5] * 480, layers=[0], heads=[1], top_k=1)).units) == 480

    run(server, test)


def test_a_long_prompt_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    server = EncodingServer(write(tmp_path, "BertModel", max_position_embeddings=4096))

    async def test(client: AsyncClient) -> None:
        for options, problem in (
            ({}, "4000 tokens in 3 layers and 4 heads is 768000000 bytes, .* at most 572 tokens fit"),
            ({"layers": [0], "heads": [3], "top_k": 1}, "4000 tokens in 1 layers .* at most 1982 tokens fit"),
        ):
            with pytest.raises(OutOfRange, match=problem):
                await client.get_attention([5] * 4000, **options)  # type: ignore[arg-type]
        assert server.engine.inline.core.steps == 0
        assert len((await client.get_attention([5] * 300, layers=[2], heads=[0], top_k=1)).units) == 300

    run(server, test)


def test_the_commands_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = make("llama", tmp_path / "checkpoint")
    word = ["attention", TEXT, "--word", "book"]

    async def test(client: AsyncClient) -> None:
        async def salver(*arguments: str) -> str:
            assert await asyncio.to_thread(main, [*arguments, "--address", server.address]) == 0
            return capsys.readouterr().out

        found = await client.get_attention(TEXT, view="head_mean", merge_words=True)
        labels = [TEXT[unit.start : unit.end].strip() for unit in found.units]
        row = found.matrices[-1].weights[labels.index("book")]
        lines = (await salver(*word)).splitlines()
        assert lines[0] == "Attention, layer 1 of 2, mean of heads"
        assert [line.split()[0] for line in lines[1:]] == labels
        for line, weight in zip(lines[1:], row, strict=True):
            assert f"{weight:.3f}" in line
            assert line.count("█") == round(30 * weight / max(row))
        assert len((await salver("attention", TEXT, "--head", "1", "--layer", "0")).splitlines()) > len(
            labels
        )
        for kind in ("svg", "html"):
            for arguments, shapes in ((word, "<path"), (["attention", TEXT + " <&>"], "<rect")):
                out = tmp_path / f"picture.{kind}"
                assert await salver(*arguments, "--rollout", "--out", str(out)) == ""
                picture = out.read_text(encoding="utf-8")
                assert picture.count(shapes) > 3 and ">book</text>" in picture
                svg = ElementTree.fromstring(picture[picture.index("<svg") : picture.index("</svg>") + 6])
                assert float(svg.attrib["width"]) > 100
        for arguments, problem in (
            (["attention", TEXT, "--word", "cat"], "is none of The, teacher"),
            ([*word, "--out", str(tmp_path / "x.png")], "must end in .svg or .html"),
        ):
            status = await asyncio.to_thread(main, [*arguments, "--address", server.address])
            assert status == 2 and problem in capsys.readouterr().err
        table = (await salver("distribution", TEXT, "--top-k", "5", "--show", "2")).splitlines()
        assert [line.split()[:2] for line in table[1:]] == [
            ["model", "266"], ["temperature", "266"], ["top_k", "5"],
        ]  # fmt: skip

    run(server, test)


def test_the_command_draws_an_encoders_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = make("BertModel", tmp_path / "checkpoint")
    other = "the student read"

    async def test(client: AsyncClient) -> None:
        found = await client.get_attention(TEXT, pair=other, view="head_mean", merge_words=True)
        texts = (TEXT, other)
        query = next(i for i, u in enumerate(found.units) if texts[u.text][u.start : u.end] == "read")
        command = ["attention", TEXT, "--pair", other, "--word", "read", "--address", server.address]
        assert await asyncio.to_thread(main, command) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        for line, unit, weight in zip(lines, found.units, found.matrices[-1].weights[query], strict=True):
            label = texts[unit.text][unit.start : unit.end] or unit.token.decode()
            assert line.split()[0] == label and f"{weight:.3f}" in line

    run(server, test)
