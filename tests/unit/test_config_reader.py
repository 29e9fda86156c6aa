"""config.json is read with types; what is not implemented is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salver.model.config_reader import ConfigReader, read_spec
from salver.model.errors import CheckpointError
from salver.model.families import FAMILIES, family
from salver.model.spec import LearnedPositions, ModelSpec, RopePositions

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """read(config, **fields) gives the spec of the config with those fields; None takes one away."""

    def read(config: dict[str, Any], generation: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
        whole = {name: value for name, value in {**config, **fields}.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_spec(tmp_path)

    return read


def test_llama(read: Any) -> None:
    spec = read(LLAMA)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 8)
    assert spec.qkv_sizes == (32, 16, 16)
    assert spec.positions == RopePositions(10000.0)
    assert not (spec.tied_head or spec.qkv_bias or spec.mlp_bias)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert spec.kv_bytes_per_token(2) == 2 * 2 * 2 * 8 * 2
    assert "head.weight" in spec.weights.tensors
    assert "head.weight" not in read(LLAMA, tie_word_embeddings=True).weights.tensors


def test_gpt2(read: Any) -> None:
    spec = read(GPT2)
    assert spec.positions == LearnedPositions()
    assert (spec.intermediate_size, spec.activation, spec.tied_head) == (128, "gelu_new", True)
    assert (spec.bos_token_id, spec.eos_token_ids) == (None, ())


def test_rope_of_both_generations(read: Any) -> None:
    """transformers 4 kept theta beside `rope_scaling`, 5 puts all into `rope_parameters`."""
    old = read(LLAMA, rope_theta=5e5, rope_scaling=LLAMA3).positions
    new = read(LLAMA, rope_parameters={**LLAMA3, "rope_theta": 5e5}).positions
    assert old == new == RopePositions(5e5, "llama3", 8.0, 1.0, 4.0, 32)
    linear = RopePositions(10000.0, "linear", 4.0)
    assert read(LLAMA, rope_scaling={"type": "linear", "factor": 4}).positions == linear
    assert (
        read(LLAMA, rope_scaling={"type": "linear", "rope_type": "linear", "factor": 4}).positions == linear
    )
    assert read(LLAMA, rope_theta=7.0, rope_scaling=None).positions == RopePositions(7.0)


def test_harmless_fields_are_passed_over(read: Any) -> None:
    read(
        LLAMA,
        torch_dtype="bfloat16",
        attention_dropout=0.1,
        initializer_range=0.02,
        use_cache=False,
        transformers_version="4.40.0",
        pretraining_tp=1,
        head_dim=None,
        rope_interleaved=False,
        something_new=None,
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures is 'MambaForCausalLM'"),
        ({"architectures": []}, "architectures must name one"),
        ({"architectures": ...}, "architectures must name one"),
        ({"architectures": [["x"]]}, "architectures is"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"num_attention_heads": 5}, r"num_attention_heads \(5\) must divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "rope_type is 'mrope'"),
        ({"rope_scaling": {"type": "axial", "factor": 2.0}}, "type is 'axial'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        ({"rope_parameters": {"rope_theta": 10.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 10.0}, "rope_theta": 11.0}, "rope_theta is 11.0"),
        (
            {"rope_parameters": {"rope_theta": 10.0}, "rope_scaling": {"type": "default"}},
            "rope_scaling stands",
        ),
    ],
)
def test_refused(fields: dict[str, Any], named: str, read: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{named}"):
        read(LLAMA, **fields)


@pytest.mark.parametrize(
    "field",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"n_head": 5},
        {"activation_function": "mish"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_refused_of_gpt2(field: dict[str, Any], read: Any) -> None:
    with pytest.raises(CheckpointError, match=next(iter(field))):
        read(GPT2, **field)


def test_generation_config_comes_first(read: Any) -> None:
    assert read(LLAMA, generation={"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert read(LLAMA, generation={"bos_token_id": 9}).eos_token_ids == (2,)
    assert read(LLAMA, generation={"bos_token_id": 9}).bos_token_id == 9


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        read_spec(tmp_path)


def test_families_register_once() -> None:
    assert {"LlamaForCausalLM", "GPT2LMHeadModel"} <= FAMILIES.keys()
    with pytest.raises(ValueError, match="registered twice"):
        family("LlamaForCausalLM")(FAMILIES["LlamaForCausalLM"])


def test_a_field_that_was_read_is_not_unknown() -> None:
    reader = ConfigReader({"a": 1, "b": 2}, "here")
    assert reader.size("a") == 1
    with pytest.raises(CheckpointError, match="here: b is 2"):
        reader.refuse_unread()
    assert reader.size("b") == 2
    reader.refuse_unread()
