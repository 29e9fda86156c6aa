"""Embeddings from real checkpoints over gRPC: the catalog's MiniLM and its default decoder."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import missing
from sklearn.neighbors import NearestNeighbors
from support import calls
from support.serving import Server

from salver.client import AsyncClient, Client, FailedPrecondition
from salver.server import catalog
from salver.v1 import encoding_pb2, encoding_pb2_grpc, explanation_pb2

TEXTS = [
    "The central bank raised interest rates for the third time this year.",
    "Monetary policy was tightened again as inflation stayed high.",
    "The striker scored twice and the home side won the final.",
    "A late goal decided the championship match.",
    "Scientists found water ice in a crater of the Moon.",
    "Frozen water was discovered on the lunar surface by researchers.",
    "x",
    "naïve café 漢字 👍 " * 30,
]

# Fifty news of a paragraph each, and how alike people find any two of them (Lee, Pincombe and Welsh 2005).
NEWS = catalog.CatalogEntry(
    name="lee",
    description="news and ratings",
    package="gensim",
    version="4.4.0",
    member="gensim/test/test_data/lee.cor",
    sha256="a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    size=24658,
    license="LGPL-2.1",
    others=(
        catalog.CatalogFile(
            "gensim/test/test_data/similarities0-1.txt",
            "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
            8738,
        ),
    ),
)


@pytest.fixture(scope="module")
def news(cache_dir: Path) -> Path:
    try:
        return catalog.fetch(NEWS.name, cache_dir, catalog={NEWS.name: NEWS})
    except catalog.CatalogError as error:
        missing(f"the news cannot be had: {error}")
        raise


@pytest.fixture(scope="module")
def minilm_checkpoint(cache_dir: Path) -> Path:
    try:
        return catalog.fetch("minilm", cache_dir)
    except catalog.CatalogError as error:
        missing(f"minilm cannot be had: {error}")
        raise


@pytest.fixture(scope="module")
def minilm(start_module_server: Callable[..., Any], minilm_checkpoint: Path) -> Server:
    server: Server = start_module_server("minilm", "--threads", "2")
    return server


def reference(checkpoint: Path, texts: list[str]) -> list[torch.Tensor]:
    """The model card's own recipe: mean of all tokens, normalized."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            vector = model(**tokens).last_hidden_state[0].mean(0)
            found.append(vector / vector.norm())
    return found


def test_minilm_equals_its_model_card(minilm: Server, minilm_checkpoint: Path) -> None:
    expected = reference(minilm_checkpoint, TEXTS)
    with Client(minilm.address) as client:
        model = client.get_model()
        assert model.tasks == ("embed",) and model.embedding_dimensions == 384
        found = client.embed(TEXTS, truncate=True)
        for embedding, wanted in zip(found, expected, strict=True):
            difference = (torch.tensor(embedding.values) - wanted).abs().max()
            assert float(difference) < 1e-5
        # Each one's nearest is the other that says the same.
        vectors = [torch.tensor(embedding.values) for embedding in found[:6]]
        for i, vector in enumerate(vectors):
            others = [(float(vector @ other), j) for j, other in enumerate(vectors) if j != i]
            assert max(others)[1] == i ^ 1
        with pytest.raises(FailedPrecondition, match="it has EMBED"):
            client.generate("hi")


def test_news_have_the_neighbours_that_they_should(
    minilm: Server, minilm_checkpoint: Path, news: Path
) -> None:
    """A store of vectors filled through the service, in batches, is asked: the answers of the reference's
    vectors, and near those of people."""
    texts = (news / "lee.cor").read_text(encoding="latin-1").splitlines()
    with Client(minilm.address) as client:
        batches = [client.embed(texts[i : i + 16], truncate=True) for i in range(0, len(texts), 16)]
        queries = np.array([client.embed(text, truncate=True)[0].values for text in texts])
    vectors = np.array([embedding.values for batch in batches for embedding in batch])
    wanted = np.stack([vector.numpy() for vector in reference(minilm_checkpoint, texts)])
    stores = [NearestNeighbors(n_neighbors=6, metric="cosine").fit(stored) for stored in (vectors, wanted)]
    distances, near = stores[0].kneighbors(queries)
    same, expected = stores[1].kneighbors(wanted)
    assert (near[:, 0] == np.arange(len(texts))).all()
    np.testing.assert_allclose(distances, same, atol=1e-4)
    # Neighbours as far as each other may change places.
    close = 1 - (wanted @ wanted.T)
    for i, (found, meant) in enumerate(zip(near, expected, strict=True)):
        np.testing.assert_allclose(close[i, found], close[i, meant], atol=1e-4)
    people = np.loadtxt(news / "similarities0-1.txt")
    pairs = np.triu_indices(len(texts), 1)
    assert np.corrcoef(people[pairs], (vectors @ vectors.T)[pairs])[0, 1] > 0.6


def test_where_the_time_of_an_encoding_went(minilm: Server) -> None:
    """Its causes sum to its wall time, and its bill to what the steps took."""
    stub = encoding_pb2_grpc.EncodingServiceStub(minilm.channel)
    inputs = [calls.prompt_of(text) for text in TEXTS]
    before = minilm.metric("salver_step_duration_seconds_sum")
    reply = stub.Embed(
        encoding_pb2.EmbedRequest(inputs=inputs, truncate=True, explain=True), timeout=calls.TIMEOUT
    )
    after = minilm.metric("salver_step_duration_seconds_sum")
    assert calls.explained(reply)[explanation_pb2.LATENCY_CAUSE_PREFILL] > 0
    assert reply.explanation.device_time.ToNanoseconds() / 1e9 == pytest.approx(after - before, abs=1e-6)
    assert not stub.Embed(encoding_pb2.EmbedRequest(inputs=inputs[:1])).HasField("explanation")


def test_a_crowd_changes_no_bit_where_that_is_promised(minilm: Server) -> None:
    with Client(minilm.address) as client:
        alone = {text: client.embed(text, truncate=True)[0].values for text in TEXTS}

    async def crowd() -> None:
        async with AsyncClient(minilm.address) as client:
            calls = [
                client.embed([TEXTS[(i + j) % 8] for j in range(1 + i % 5)], truncate=True) for i in range(40)
            ]
            for i, found in enumerate(await asyncio.gather(*calls)):
                for j, embedding in enumerate(found):
                    wanted = alone[TEXTS[(i + j) % 8]]
                    if minilm.server_info().numerics_id.startswith("bits-"):
                        assert embedding.values == wanted
                    assert math.dist(embedding.values, wanted) < 1e-5

    asyncio.run(crowd())


def test_a_decoder_embeds_while_it_generates(tiny: Server, tiny_llama: Path) -> None:
    """Mean and last token of a prompt longer than a step, beside streams that stay the same."""
    from transformers import AutoModel

    ids = [(7 * i) % 250 + 2 for i in range(300)]
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
    before = tiny.tokens("the inn", max_tokens=40)
    with Client(tiny.address) as client:
        assert "embed" in client.get_model().tasks
        stream = tiny.stream("the inn", max_tokens=40)
        mean, last = (client.embed([ids], pooling=name)[0].values for name in ("mean", "last_token"))
        again = client.embed([ids, ids[:50], ids], pooling="mean")
        tokens = [token for message in stream for c in message.completions for token in c.token_ids]
        (each,) = client.embed([ids[:20]], per_token=True)
    assert tokens == before
    assert float((torch.tensor(mean) - hidden.mean(0)).abs().max()) < 1e-4
    assert float((torch.tensor(last) - hidden[-1]).abs().max()) < 1e-4
    assert torch.allclose(torch.tensor([t.values for t in each.tokens]), hidden[:20], atol=1e-4)
    if tiny.server_info().numerics_id.startswith("bits-"):
        assert again[0].values == again[2].values == mean
