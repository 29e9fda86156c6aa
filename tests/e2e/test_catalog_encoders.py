"""The catalog's token classifier and masked language model, against what others make of the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import missing
from support.serving import Server

from salver.client import Client
from salver.server import catalog

LETTER = "Dear Ms. Okafor, please send the refund to Anna Lindqvist, 4121 Birch Street, Denver. Thanks, Paul"
RESIDUES = "E V Q L V E S G G G L V Q P G G S L R L S C A A S G F T F S"


def fetched(name: str, cache_dir: Path) -> Path:
    try:
        return catalog.fetch(name, cache_dir)
    except catalog.CatalogError as error:
        missing(f"{name} cannot be had: {error}")
        raise


def test_rampart_labels_what_is_personal(start_server: Callable[..., Any], cache_dir: Path) -> None:
    import onnxruntime
    from tokenizers import Tokenizer

    checkpoint = fetched("rampart", cache_dir)
    session = onnxruntime.InferenceSession(str(checkpoint / "onnx" / "model_q4.onnx"))
    tokens = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(LETTER)
    ones = [1] * len(tokens.ids)
    feed = {"input_ids": [tokens.ids], "attention_mask": [ones], "token_type_ids": [tokens.type_ids]}
    given = {known.name for known in session.get_inputs()}
    (logits,) = session.run(None, {name: np.array(v, np.int64) for name, v in feed.items() if name in given})
    scores = torch.tensor(logits[0]).softmax(-1)[1:-1]  # without the special tokens
    server: Server = start_server("rampart", "--threads", "2")
    with Client(server.address) as client:
        model = client.get_model()
        assert model.tasks == ("embed", "classify_tokens") and len(model.labels) == 35
        (raw,) = client.classify_tokens(LETTER, include_outside=True)
        assert [s.label for s in raw.spans] == [model.labels[i] for i in scores.argmax(-1).tolist()]
        np.testing.assert_allclose([s.score for s in raw.spans], scores.amax(-1), atol=2e-3)
        (merged,) = client.classify_tokens(LETTER, aggregation="first")  # whole words
    found = {span.text: span.label for span in merged.spans}
    assert found["Anna"] == found["Paul"] == "GIVEN_NAME" and found["Lindqvist"] == "SURNAME"
    assert found["Denver"] == "CITY"


def test_antiberty_fills_residues(start_server: Callable[..., Any], cache_dir: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    checkpoint = fetched("antiberty", cache_dir)
    reference = BertForMaskedLM(BertConfig.from_json_file(checkpoint / "config.json")).eval()
    weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    lacking = reference.load_state_dict(weights, strict=False)
    assert not lacking.missing_keys
    vocabulary = (checkpoint / "vocab.txt").read_text().split("\n")
    residues = RESIDUES.split()
    residues[4] = residues[20] = "[MASK]"
    ids = [vocabulary.index(token) for token in ("[CLS]", *residues, "[SEP]")]
    with torch.inference_mode():
        probabilities = reference(torch.tensor([ids])).logits[0].softmax(-1)
    server: Server = start_server("antiberty", "--threads", "2")
    with Client(server.address) as client:
        assert client.get_model().tasks == ("embed", "fill_mask")
        (masks,) = client.fill_mask(" ".join(residues), top_k=5)
    for mask, place in zip(masks, (5, 21), strict=True):
        best = probabilities[place].topk(5)
        assert [candidate.token_id for candidate in mask.candidates] == best.indices.tolist()
        found = [candidate.probability for candidate in mask.candidates]
        np.testing.assert_allclose(found, best.values, atol=1e-4)
    # As they were, or as the other common germline has it.
    assert {candidate.token for candidate in masks[0].candidates[:2]} == {"V", "L"}
    assert masks[1].candidates[0].token == "S"
