"""Every encoder family with every head against transformers, alone and in a batch with strangers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import VOCAB, Oracle, answers, architectures, load, write_encoder
from support.stack import random_prompts

from salver.model.errors import CheckpointError
from salver.model.kernels.build import KernelUnavailable, find_or_build
from salver.model.kernels.library import Library
from salver.model.kernels.linear import use_native_products

TOLERANCE = 5e-5  # of outputs of about 1 to 10
LENGTHS = [5, 31, 5, 1, 60, 17, 31]


def prompts(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Ids from 3 on: none of them is padding to anybody."""
    return [[3 + i for i in ids] for ids in random_prompts(VOCAB - 3, lengths, seed)]


@pytest.mark.parametrize("architecture", architectures())
def test_equals_transformers_alone_and_with_strangers(tmp_path: Path, architecture: str) -> None:
    checkpoint = write_encoder(tmp_path, architecture)
    model, oracle = load(checkpoint), Oracle(checkpoint, architecture)
    inputs = prompts()
    expected = [oracle(ids) for ids in inputs]
    assert max(float(e.std()) for e in expected if e.numel() > 1) > 0.3, "outputs this flat show nothing"
    for ids, wanted in zip(inputs, expected, strict=True):
        (alone,) = answers(model, [ids])
        assert float((alone - wanted).abs().max()) < TOLERANCE
    for row_multiple in (1, 8):
        together = answers(model, inputs, row_multiple=row_multiple)
        for found, wanted in zip(together, expected, strict=True):
            assert float((found - wanted).abs().max()) < TOLERANCE


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "ElectraModel", "AlbertModel"])
def test_segments_count(tmp_path: Path, architecture: str) -> None:
    checkpoint = write_encoder(tmp_path, architecture)
    model, oracle = load(checkpoint), Oracle(checkpoint, architecture)
    inputs = prompts([9, 20])
    kinds = [[0] * 4 + [1] * 5, [0] * 11 + [1] * 9]
    plain = answers(model, inputs)
    for found, ids, segments, without in zip(
        answers(model, inputs, kinds), inputs, kinds, plain, strict=True
    ):
        assert float((found - oracle(ids, segments)).abs().max()) < TOLERANCE
        assert float((found - without).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("architecture", ["RobertaModel", "MPNetModel"])
def test_padding_that_a_text_spells_has_no_position(tmp_path: Path, architecture: str) -> None:
    checkpoint = write_encoder(tmp_path, architecture)
    model, oracle = load(checkpoint), Oracle(checkpoint, architecture)
    ids = [5, 1, 9, 1, 1, 20, 7]
    (found,) = answers(model, [ids])
    assert float((found - oracle(ids)).abs().max()) < TOLERANCE


# One field of a config each, of which the weights know nothing: another value must show.
KNOBS: list[tuple[str, str, Any]] = [
    ("BertModel", "hidden_act", "relu"),
    ("BertModel", "layer_norm_eps", 0.1),
    ("BertModel", "num_attention_heads", 2),
    ("RobertaModel", "pad_token_id", 0),
    ("AlbertModel", "num_hidden_layers", 6),
    ("AlbertModel", "hidden_act", "relu"),
    ("ElectraForSequenceClassification", "hidden_act", "relu"),
    ("DistilBertModel", "n_heads", 2),
    ("DistilBertModel", "activation", "relu"),
    ("ModernBertModel", "local_attention", 4),
    ("ModernBertModel", "layer_types", ["full_attention"] * 4),
    ("ModernBertModel", "norm_eps", 0.1),
    ("ModernBertModel", "hidden_activation", "silu"),
    ("ModernBertForSequenceClassification", "classifier_pooling", "mean"),
    ("ModernBertForSequenceClassification", "classifier_activation", "silu"),
    ("NomicBertModel", "hidden_act", "gelu"),
    ("NomicBertModel", "rope_parameters", {"rope_type": "default", "rope_theta": 10.0}),
]


@pytest.mark.parametrize(("architecture", "field", "value"), KNOBS)
def test_every_knob_turns(tmp_path: Path, architecture: str, field: str, value: Any) -> None:
    """Equal to transformers after the change, and no longer equal to what it was before it."""
    checkpoint = write_encoder(tmp_path, architecture)
    inputs = prompts([40, 7])
    before = answers(load(checkpoint), inputs)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    assert config.get(field) != value
    path.write_text(json.dumps({**config, field: value}))
    oracle = Oracle(checkpoint, architecture)
    for ids, old, found in zip(inputs, before, answers(load(checkpoint), inputs), strict=True):
        assert float((found - oracle(ids)).abs().max()) < TOLERANCE
        assert len(ids) < 40 or float((found - old).abs().max()) > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("BertModel", "position_embedding_type", "relative_key"),
        ("BertModel", "hidden_act", "mish"),
        ("BertModel", "is_decoder", True),
        ("BertModel", "use_bias", "no"),
        ("AlbertModel", "inner_group_num", 2),
        ("ModernBertModel", "layer_types", ["full_attention"] * 3),
        ("BertForMaskedLM", "tie_word_embeddings", False),
        ("BertForSequenceClassification", "id2label", {"0": "a", "2": "b"}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, architecture: str, field: str, value: Any
) -> None:
    path = write_encoder(tmp_path, architecture) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=field):
        load(tmp_path)


def rewrite(checkpoint: Path, change: Any) -> None:
    file = checkpoint / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_old_names_and_missing_prefixes(tmp_path: Path) -> None:
    checkpoint = write_encoder(tmp_path, "BertForSequenceClassification")
    inputs = prompts()
    expected = answers(load(checkpoint), inputs)
    rewrite(checkpoint, lambda name: name.removeprefix("bert."))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rewrite(checkpoint, lambda name: next((name.replace(a, b) for a, b in old.items() if a in name), name))
    assert all(torch.equal(a, b) for a, b in zip(answers(load(checkpoint), inputs), expected, strict=True))


def test_pickled_weights(tmp_path: Path) -> None:
    checkpoint = write_encoder(tmp_path, "BertModel")
    expected = answers(load(checkpoint), prompts())
    file = checkpoint / "model.safetensors"
    torch.save(
        {**load_file(file), "embeddings.position_ids": torch.arange(64)[None]}, tmp_path / "pytorch_model.bin"
    )
    file.unlink()
    assert all(torch.equal(a, b) for a, b in zip(answers(load(checkpoint), prompts()), expected, strict=True))


def test_a_body_leaves_the_heads_of_its_pretraining_alone(tmp_path: Path) -> None:
    checkpoint = write_encoder(tmp_path, "BertForMaskedLM")
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["BertModel"]}))
    found, wanted = answers(load(checkpoint), prompts()), Oracle(checkpoint, "BertModel")
    for ids, hidden in zip(prompts(), found, strict=True):
        assert float((hidden - wanted(ids)).abs().max()) < TOLERANCE


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = write_encoder(tmp_path, "BertForTokenClassification")
    rewrite(
        checkpoint, lambda name: name.replace("encoder.layer.1.output.dense.bias", "encoder.layer.1.extra")
    )
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        load(checkpoint)
    write_encoder(tmp_path, "BertForTokenClassification")
    rewrite(checkpoint, lambda name: name + (".extra" if name == "classifier.bias" else ""))
    with pytest.raises(CheckpointError, match=r"classifier\.bias is missing"):
        load(checkpoint)


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "ModernBertForTokenClassification", "MPNetModel"]
)
def test_native_products_give_every_row_its_bits(tmp_path: Path, cache_dir: Path, architecture: str) -> None:
    """Alone, in any company, at any place among the rows; and transformers' answer."""
    library = native_library(cache_dir)
    checkpoint = write_encoder(tmp_path, architecture)
    model, oracle = load(checkpoint), Oracle(checkpoint, architecture)
    use_native_products(model, library, 2)
    inputs = prompts()
    alone = [answers(model, [ids])[0] for ids in inputs]
    for ids, found in zip(inputs, alone, strict=True):
        assert float((found - oracle(ids)).abs().max()) < TOLERANCE
    draw = random.Random(0)
    for _ in range(10):
        order = [draw.randrange(len(inputs)) for _ in range(draw.randrange(1, 40))]
        together = answers(model, [inputs[i] for i in order])
        assert all(torch.equal(found, alone[i]) for found, i in zip(together, order, strict=True))


def native_library(cache_dir: Path) -> Library:
    try:
        return Library(find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")
