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
    ("BertForMaskedLM", "hidden_act", "silu"),
    ("RobertaModel", "pad_token_id", 0),
    ("XLMRobertaModel", "pad_token_id", 0),
    ("CamembertModel", "layer_norm_eps", 0.1),
    ("MPNetModel", "hidden_act", "relu"),
    ("MPNetModel", "layer_norm_eps", 0.1),
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
    ("DebertaV2Model", "pos_att_type", "c2p"),
    ("DebertaV2Model", "pos_att_type", ["p2c"]),
    ("DebertaV2Model", "pos_att_type", []),
    ("DebertaV2Model", "relative_attention", False),
    ("DebertaV2Model", "max_relative_positions", 20),
    ("DebertaV2Model", "norm_rel_ebd", "none"),
    ("DebertaV2Model", "conv_act", "tanh"),
    ("DebertaV2Model", "layer_norm_eps", 0.1),
    ("DebertaV2Model", "hidden_act", "relu"),
    ("DebertaV2ForSequenceClassification", "pooler_hidden_act", "tanh"),
    ("NomicBertModel", "hidden_act", "gelu"),
    ("NomicBertModel", "layer_norm_eps", 0.1),
    ("NomicBertModel", "rope_parameters", {"rope_type": "default", "rope_theta": 10.0}),
]


# What an architecture has with other weights too.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("DebertaV2Model", {"share_att_key": False}),
    ("DebertaV2Model", {"share_att_key": False, "pos_att_type": ["c2p"]}),
    ("DebertaV2Model", {"share_att_key": False, "pos_att_type": ["p2c"], "norm_rel_ebd": "none"}),
    ("DebertaV2Model", {"position_buckets": -1}),
    ("DebertaV2Model", {"position_buckets": -1, "max_relative_positions": 12}),
    ("DebertaV2Model", {"position_biased_input": True, "type_vocab_size": 2}),
    ("DebertaV2Model", {"conv_kernel_size": 5}),
    ("DebertaV2Model", {"conv_kernel_size": 0}),
    ("DebertaV2Model", {"embedding_size": 24}),
    ("DebertaV2ForMaskedLM", {"embedding_size": 24, "legacy": True}),
]


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_variants(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    checkpoint = write_encoder(tmp_path, architecture, **changes)
    model, oracle = load(checkpoint), Oracle(checkpoint, architecture)
    inputs = prompts()
    for found, ids in zip(answers(model, inputs), inputs, strict=True):
        assert float((found - oracle(ids)).abs().max()) < TOLERANCE


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
        ("NomicBertModel", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}),
        ("DebertaV2Model", "pos_att_type", "c2p|p2p"),
        ("DebertaV2Model", "conv_groups", 2),
        ("DebertaV2Model", "conv_kernel_size", 4),
        ("DebertaV2Model", "attention_head_size", 16),
        ("DebertaV2Model", "position_buckets", 1),
        ("DebertaV2ForSequenceClassification", "pooler_hidden_size", 16),
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


# What config.json of nomic-embed-text says beside sizes, in the layout of the code that came with it.
FIRST_NOMIC: dict[str, Any] = {
    "activation_function": "swiglu", "attn_pdrop": 0.0, "auto_map": {"AutoModel": "x--modeling.Nomic"},
    "bos_token_id": None, "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None,
    "fused_bias_fc": True, "fused_dropout_add_ln": True, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "model_type": "nomic_bert", "pad_vocab_size_multiple": 64, "parallel_block": False,
    "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False,
    "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
    "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None,
    "summary_first_dropout": 0.0, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "torch_dtype": "float32", "transformers_version": "4.37.2",
    "type_vocab_size": 2, "use_cache": True, "use_flash_attn": True, "use_rms_norm": False,
}  # fmt: skip


def write_first_nomic(directory: Path, architecture: str, **changes: Any) -> Oracle:
    """A checkpoint as nomic-embed-text was published, and transformers' answers of the same weights.

    Its vocabulary is padded to a multiple of 64 and its MLPs to one of 256.
    """
    ours = architecture.replace("PreTraining", "MaskedLM")
    write_encoder(directory, ours, vocab_size=128, intermediate_size=256)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if architecture.endswith("PreTraining"):  # whose heads have no biases
        for name in ("cls.predictions.transform.dense.bias", "cls.predictions.bias"):
            tensors[name].zero_()
        save_file(tensors, file, {"format": "pt"})
    oracle = Oracle(directory, ours)
    config = json.loads((directory / "config.json").read_text())
    kept = {name: config[name] for name in ("id2label", "label2id", "pad_token_id") if name in config}
    sizes = {"n_embd": 48, "n_head": 4, "n_inner": 200, "n_layer": 3, "n_positions": 64, "vocab_size": 97}
    (directory / "config.json").write_text(
        json.dumps({**FIRST_NOMIC, **sizes, **kept, "architectures": [architecture], **changes})
    )
    if architecture.endswith("PreTraining"):
        for name in [name for name in tensors if name.startswith("cls.") and name.endswith("bias")]:
            if "layer_norm" not in name:
                del tensors[name]
    save_file({name.replace("nomic_bert.", "bert."): tensor for name, tensor in tensors.items()}, file)
    return oracle


@pytest.mark.parametrize("head", ["Model", "ForPreTraining", "ForSequenceClassification"])
def test_the_first_layout_of_nomic(tmp_path: Path, head: str) -> None:
    oracle = write_first_nomic(tmp_path, f"NomicBert{head}")
    model, inputs = load(tmp_path), prompts()
    for ids, found in zip(inputs, answers(model, inputs), strict=True):
        assert float((found - oracle(ids)).abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotary_scaling_factor", 2),
        ("rotary_emb_fraction", 0.0),
        ("rotary_emb_interleaved", True),
        ("activation_function", "gelu"),
        ("prenorm", True),
        ("use_rms_norm", True),
        ("mlp_fc1_bias", True),
        ("mlp_fc2_bias", None),
        ("num_heads_kv", 2),
        ("moe_every_n_layers", 2),
    ],
)
def test_what_the_first_layout_of_nomic_can_say_and_is_not_implemented(
    tmp_path: Path, field: str, value: Any
) -> None:
    write_first_nomic(tmp_path, "NomicBertModel", **{field: value})
    with pytest.raises(CheckpointError, match=field):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("rotary_emb_base", 10.0), ("rotary_emb_fraction", 0.5), ("layer_norm_epsilon", 0.1)]
)
def test_every_knob_of_the_first_layout_of_nomic_turns(tmp_path: Path, field: str, value: Any) -> None:
    oracle = write_first_nomic(tmp_path, "NomicBertModel", **{field: value})
    (ids,) = prompts([40])
    (found,) = answers(load(tmp_path), [ids])
    assert float((found - oracle(ids)).abs().max()) > 20 * TOLERANCE


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
    "architecture", ["BertForMaskedLM", "ModernBertForTokenClassification", "MPNetModel", "DebertaV2Model"]
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
