"""LlamaForCausalLM against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parity import TOLERANCE, assert_same_greedy_tokens, difference, oracle, write_checkpoint
from support.stack import Stack, random_prompts

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 6},
    "head_dim": {"head_dim": 20},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "activation": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
}


def write(directory: Path, save: dict[str, Any] | None = None, **fields: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return write_checkpoint(directory, LlamaForCausalLM, LlamaConfig(**{**SMALL, **fields}), **(save or {}))


def edit_config(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, tmp_path: Path) -> None:
    assert difference(write(tmp_path, **VARIANTS[variant])) < TOLERANCE


@pytest.mark.parametrize("variant", ["grouped queries", "biases", "llama3 scaling"])
def test_greedy_tokens(variant: str, tmp_path: Path) -> None:
    assert_same_greedy_tokens(write(tmp_path, **VARIANTS[variant]))


def test_a_config_of_transformers_4(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` (with `type`), `torch_dtype`, nulls."""
    checkpoint = write(tmp_path, **VARIANTS["linear scaling"])
    expected = difference(checkpoint)
    edit_config(
        checkpoint,
        rope_parameters=None,
        dtype=None,
        torch_dtype="float32",
        rope_theta=1e4,
        rope_scaling={"type": "linear", "factor": 3.0},
    )
    assert difference(checkpoint) == expected < TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 0.1},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_wrong_field_shows(fields: dict[str, Any], tmp_path: Path) -> None:
    """The comparison can fail: one field read otherwise is far outside the tolerance."""
    checkpoint = write(tmp_path / "right")
    wrong = write(tmp_path / "wrong")
    edit_config(wrong, **fields)
    assert difference(checkpoint, Stack(wrong)) > 100 * TOLERANCE


@pytest.mark.parametrize("shard", [None, "30KB"])
@pytest.mark.parametrize("safetensors", [True, False])
def test_file_formats(shard: str | None, safetensors: bool, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, save={"max_shard_size": shard} if shard else {})
    if not safetensors:
        for path in sorted(tmp_path.glob("*.safetensors")):
            name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            torch.save(load_file(path), tmp_path / name)
            path.unlink()
        for path in tmp_path.glob("*.index.json"):
            text = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            path.unlink()
    suffix = "safetensors" if safetensors else "bin"
    assert (len(list(tmp_path.glob(f"*.{suffix}"))) > 1) == bool(shard)
    assert difference(checkpoint) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_half_precisions(dtype: torch.dtype, numerics: str, tmp_path: Path) -> None:
    """As near to the float32 truth as transformers in the same precision, however it is cut."""
    checkpoint = write(tmp_path, initializer_range=0.1)
    stack = Stack(checkpoint, dtype=dtype, numerics=numerics)
    (prompt,) = random_prompts(199, [61])
    with torch.inference_mode():
        reference = oracle(checkpoint)
        truth = reference(torch.tensor([prompt])).logits[0]
        theirs = (reference.to(dtype)(torch.tensor([prompt])).logits[0].float() - truth).abs().mean()
    for chunk in (None, 9, 1):
        assert (stack.logits(prompt, chunk) - truth).abs().mean() < 1.5 * theirs


def test_fast_numerics(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    assert difference(checkpoint, Stack(checkpoint, numerics="fast")) < TOLERANCE


def test_a_tied_head_that_was_saved(tmp_path: Path) -> None:
    """A copy of the embedding is welcome; anything else would be ignored, so it is refused."""
    from salver.model.errors import CheckpointError

    checkpoint = write(tmp_path, tie_word_embeddings=True)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, checkpoint / "model.safetensors")
    assert difference(checkpoint) < TOLERANCE
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        Stack(checkpoint)
