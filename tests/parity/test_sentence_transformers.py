"""Embeddings of directories that sentence-transformers wrote, against its own."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.test_decoder_heads import write_served
from parity.test_encoding_service import TEXTS, write
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, Normalize, Pooling, Transformer
from support.encoding_service import EncodingServer
from support.inspection_service import DecoderServer

from salver.client import AsyncClient
from salver.model.embedding_spec import read_embedding_spec
from salver.model.errors import CheckpointError

PROMPTS = {"query": "who has it in paris ", "document": "the book was "}
MODES = ("cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


def save(checkpoint: Path, directory: Path, modes: tuple[str, ...], *more: Any, **options: Any) -> Any:
    """A sentence-transformers model over the checkpoint, saved; the model."""
    body = Transformer(str(checkpoint), max_seq_length=60)
    pooling = Pooling(body.get_embedding_dimension(), pooling_mode=modes)
    made = SentenceTransformer(modules=[body, pooling, *more], device="cpu", prompts=PROMPTS, **options)
    made.save(str(directory))
    return made


def compare(server: EncodingServer, model: Any, texts: list[str]) -> None:
    async def inside() -> None:
        async with server.running() as client:
            await check(client)

    async def check(client: AsyncClient) -> None:
        for name in (None, *PROMPTS):
            options: Any = {} if name is None else {"prompt_name": name}
            expected = model.encode(texts, prompt_name=name, convert_to_numpy=True)
            found = await client.embed(texts, **options, truncate=True)
            np.testing.assert_allclose([e.values for e in found], expected, atol=1e-4)
        assert (await client.get_model()).embedding_dimensions == expected.shape[1]

    asyncio.run(asyncio.wait_for(inside(), 60))


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("lasttoken", "cls", "mean")])
def test_poolings(tmp_path: Path, modes: tuple[str, ...]) -> None:
    checkpoint = write(tmp_path / "body", "BertModel")
    model = save(checkpoint, tmp_path / "st", modes)
    compare(EncodingServer(tmp_path / "st"), model, [*TEXTS, " ".join(["the book"] * 60)])


def test_dense_and_normalize(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "body", "BertModel")
    torch.manual_seed(1)
    dense = [
        Dense(48, 20, activation_function=torch.nn.Tanh()),
        Dense(20, 12, bias=False, activation_function=torch.nn.Identity()),
    ]
    model = save(checkpoint, tmp_path / "st", ("mean",), *dense, Normalize(), default_prompt_name="query")
    server = EncodingServer(tmp_path / "st")
    assert server.model.embedding.default_prompt_name == "query"
    compare(server, model, TEXTS)


def test_early_layouts(tmp_path: Path) -> None:
    """A file of the family's name says the limit and the case; a Dropout among the modules does nothing."""
    checkpoint = write(tmp_path / "body", "BertModel")
    model = save(checkpoint, tmp_path / "st", ("mean",), Dropout(0.5), Normalize())
    model.eval()
    (tmp_path / "st" / "sentence_bert_config.json").unlink()
    settings = {"max_seq_length": 9, "do_lower_case": True}
    (tmp_path / "st" / "sentence_roberta_config.json").write_text(json.dumps(settings))
    server = EncodingServer(tmp_path / "st")
    assert server.model.embedding.max_tokens == 9 and server.model.embedding.lower_case
    model.max_seq_length = 9
    compare(server, model, TEXTS)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("1_Pooling/config.json", "include_prompt", False),
        ("1_Pooling/config.json", "pooling_mode", "attention"),
        ("2_Normalize/config.json", "module_input_name", "token_embeddings"),
        ("sentence_bert_config.json", "transformer_task", "fill-mask"),
        ("config_sentence_transformers.json", "default_prompt_name", "passage"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, file: str, field: str, value: object
) -> None:
    save(write(tmp_path / "body", "BertModel"), tmp_path / "st", ("mean",), Normalize())
    path = tmp_path / "st" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=rf"{file}: .*{field}|{file}: {field}"):
        read_embedding_spec(tmp_path / "st")


def test_over_a_decoder(tmp_path: Path) -> None:
    """The last token of a causal body, which is what most large embedding models are."""
    write_served(tmp_path / "body", "Qwen3", "Model")
    path = tmp_path / "body" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "</s>"}))
    model = save(tmp_path / "body", tmp_path / "st", ("lasttoken",), Normalize())
    draw = random.Random(0)
    texts = ["the an in the other", *(" ".join(draw.choices(["the", "an", "in"], k=k)) for k in (3, 17))]
    compare(DecoderServer(tmp_path / "st"), model, texts)
