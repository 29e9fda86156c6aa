"""GetAttention and GetDistribution of encoder-decoders over gRPC, against transformers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from parity.test_attention_service import ids_of, matrices
from parity.test_inspection_service import run
from parity.test_seq2seq import NATIVE, texts
from support.checkpoints import write_tokenizer
from support.exactness import find_library
from support.inspection_service import DecoderServer
from support.seq2seq import VARIANTS, write, write_translator
from transformers import AutoModelForSeq2SeqLM

from salver.client import AsyncClient, Attention, OutOfRange
from salver.client.cli import main

TEXT, WRITTEN = "the cat sat on a mat.", "die katze sa auf der matte"
FAMILIES = [name for name in VARIANTS if name.endswith(" plain")]


@torch.inference_mode()
def oracle(checkpoint: Path, source: list[int], output: list[int]) -> dict[str, Any]:
    """By kind: [layers, heads, queries, keys]; and the logits [vocab] behind the output."""
    model = AutoModelForSeq2SeqLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([source])
    made = model.eval()(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([output]),
        output_attentions=True,
    )  # fmt: skip
    found = {
        kind: torch.cat(made[name]).numpy()
        for kind, name in ((kind, f"{kind}_attentions") for kind in ("encoder", "decoder", "cross"))
    }
    return {**found, "logits": made.logits[0, -1].double()}


def queries_of(found: Attention) -> list[int]:
    return [token_id for unit in found.queries for token_id in unit.token_ids]


async def weights_are_the_same(
    client: AsyncClient, server: DecoderServer, checkpoint: Path, tolerance: float
) -> None:
    """Of every kind, in a source and an output longer than a step, and in short ones."""
    spec = server.runner.model.spec
    for length, count in ((41, 30), (3, 5)):
        (source,), (output,) = texts([length]), texts([count], spec.vocab_size, seed=1)
        wanted = oracle(checkpoint, source, [*spec.output_start, *output])
        for kind in ("encoder", "decoder", "cross"):
            given: Any = {} if kind == "encoder" else {"target": output}
            found = await client.get_attention(source, kind=kind, **given)
            layers, heads, queries, keys = wanted[kind].shape
            assert (found.num_layers, found.num_heads) == (layers, heads)
            assert [(m.layer, m.head) for m in found.matrices] == [
                (layer, head) for layer in range(layers) for head in range(heads)
            ]
            assert (len(found.queries), len(found.units)) == (queries, keys)
            assert ids_of(found) == ([*spec.output_start, *output] if kind == "decoder" else source)
            raw = matrices(found).reshape(wanted[kind].shape)
            np.testing.assert_allclose(raw, wanted[kind], atol=tolerance)
            np.testing.assert_allclose(raw.sum(-1), 1, atol=1e-5)
            assert length < 10 or wanted[kind].std() > 0.1 / keys, "all alike"
            some = await client.get_attention(source, kind=kind, layers=[1], heads=[1], **given)
            np.testing.assert_array_equal(matrices(some)[0], raw[1, 1])
        # Unspecified, it is the cross-attention.
        found = await client.get_attention(source, target=output, view="head_mean")
        np.testing.assert_allclose(matrices(found), wanted["cross"].mean(1), atol=tolerance)
        assert queries_of(found) == [*spec.output_start, *output] and ids_of(found) == source


@pytest.mark.parametrize("name", [*FAMILIES, "T5 flan", "Marian own"])
def test_weights_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write(tmp_path, VARIANTS[name])
    write_tokenizer(tmp_path, None)
    server = DecoderServer(tmp_path)

    async def test(client: AsyncClient) -> None:
        await weights_are_the_same(client, server, tmp_path, 1e-4)

    run(server, test)


@pytest.mark.parametrize("name", ["Marian paper", "UMT5 plain"])
def test_weights_of_the_native_kernel(name: str, tmp_path: Path, cache_dir: Path) -> None:
    """Its programs stop in between, and only for who looks."""
    library = find_library(cache_dir)
    if library is None:
        pytest.skip("no native kernel here")
    variant = VARIANTS[name]
    write(tmp_path, replace(variant, config={**variant.config, **NATIVE[name]}))
    write_tokenizer(tmp_path, None)
    server = DecoderServer(tmp_path, library)

    async def test(client: AsyncClient) -> None:
        options: Any = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3}
        alone = await client.generate([5, 6, 7], **options)
        await weights_are_the_same(client, server, tmp_path, 5e-4)
        attention = await client.get_attention([5, 6, 7], target=[8, 9])
        found = await asyncio.gather(
            client.generate([5, 6, 7], **options),
            client.get_attention([5, 6, 7], target=[8, 9]),
            client.get_attention([5, 6, 7], kind="encoder"),
        )
        assert found[0].completions == alone.completions and found[1] == attention

    run(server, test)


def test_words_of_two_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own tokenizer; on a terminal and as a picture too."""
    checkpoint = tmp_path / "checkpoint"
    write_translator(checkpoint)
    server = DecoderServer(checkpoint)
    server.model = replace(server.model, limits=replace(server.model.limits, max_message_bytes=1 << 17))
    spec = server.runner.model.spec

    async def test(client: AsyncClient) -> None:
        plain = await client.get_attention(TEXT, target=WRITTEN, target_language="fr", view="head_mean")
        source = list(server.tokenizer.encode(TEXT))
        french = server.tokenizer.languages["fr"]
        assert ids_of(plain) == [french, *source]
        assert queries_of(plain) == [*spec.output_start, *server.tokenizer.encode_output(WRITTEN)]
        wanted = oracle(checkpoint, [french, *source], queries_of(plain))
        np.testing.assert_allclose(matrices(plain), wanted["cross"].mean(1), atol=1e-4)
        found = await client.get_attention(TEXT, target=WRITTEN, merge_words=True, view="head_mean")
        words = [TEXT[unit.start : unit.end].strip() for unit in found.units]
        assert words == [*TEXT.split(), ""] and not any(unit.text for unit in found.units)
        written = [WRITTEN[u.start : u.end].strip() for u in found.queries if u.text == 1]
        assert written == WRITTEN.split() and len(found.queries) == len(written) + 1
        rows = matrices(found)
        assert rows.shape[1:] == (len(found.queries), len(found.units))
        np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
        cut = await client.get_attention(
            "the " * 300, kind="encoder", layers=[0], heads=[1], top_k=1, truncate=True
        )
        assert server.model.source is not None
        assert len(cut.units) == server.model.source.max_input_tokens and cut.truncated_tokens > 0
        with pytest.raises(OutOfRange, match=r"82 tokens to 80 in 3 layers and 2 heads .* 5120 pairs of"):
            await client.get_attention([5] * 80, target=[6] * 81)

        async def salver(*arguments: str) -> str:
            command = ["attention", TEXT, "--target", WRITTEN, "--address", server.address, *arguments]
            assert await asyncio.to_thread(main, command) == 0
            return capsys.readouterr().out

        lines = (await salver("--word", "katze")).splitlines()
        assert lines[0] == "Attention, layer 2 of 3, mean of heads"
        row = rows[-1][[*written].index("katze") + 1]
        for line, word, weight in zip(lines[1:], [*words[:-1], "</s>"], row, strict=True):
            assert line.split()[0] == word and f"{weight:.3f}" in line and "←" not in line
        lines = (await salver()).splitlines()
        assert [line.split()[0] for line in lines[-len(written) - 1 : -1]] == written
        assert lines[-1] == "  ".join(f"{n} {word}" for n, word in enumerate([*words[:-1], "</s>"], 1))
        for word, shapes in ((["--word", "hund"], None), (["--word", "matte"], "<path"), ([], "<rect")):
            if shapes is None:
                command = ["attention", TEXT, "--target", WRITTEN, *word, "--address", server.address]
                assert await asyncio.to_thread(main, command) == 2
                assert "is none of" in capsys.readouterr().err
                continue
            out = tmp_path / "picture.html"
            await salver(*word, "--out", str(out))
            picture = out.read_text(encoding="utf-8")
            ElementTree.fromstring(picture[picture.index("<svg") : picture.index("</svg>") + 6])
            assert picture.count(shapes) > 3 and ">katze</text>" in picture and ">cat</text>" in picture

    run(server, test)


def test_distributions_are_those_of_transformers(tmp_path: Path) -> None:
    """Of the token behind an output so far, beside a source, in the crowd of other requests."""
    write_translator(tmp_path)
    server = DecoderServer(tmp_path)
    spec = server.runner.model.spec

    async def test(client: AsyncClient) -> None:
        source = list(server.tokenizer.encode(TEXT))
        vocab = spec.vocab_size
        for output in ([], [9, 12, 5]):
            asked: Any = {"output_token_ids": output, "temperature": 1.0, "num_candidates": vocab}
            (steps, again), _ = await asyncio.gather(
                asyncio.gather(*(client.get_distribution(TEXT, **asked) for _ in range(2))),
                client.generate("a mat", max_tokens=9),
            )
            assert steps == again
            logits = oracle(tmp_path, source, [*spec.output_start, *output])["logits"]
            wanted = logits.softmax(-1)
            for candidate in steps[0].candidates:
                assert candidate.probability == pytest.approx(float(wanted[candidate.token_id]), abs=1e-5)
        told = await client.get_distribution(TEXT, temperature=1.0, target_language="fr")
        assert told[0] != steps[0]
        assert await asyncio.to_thread(main, ["distribution", TEXT, "--address", server.address]) == 0

    run(server, test)
