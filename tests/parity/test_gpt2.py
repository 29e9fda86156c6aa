"""GPT2LMHeadModel against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parity import TOLERANCE, assert_same_greedy_tokens, difference, write_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "n_positions": 256,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inner size": {"n_inner": 100},
    "untied head": {"tie_word_embeddings": False},
    "gelu": {"activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "relu": {"activation_function": "relu"},
}


def write(directory: Path, **fields: Any) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    return write_checkpoint(directory, GPT2LMHeadModel, GPT2Config(**{**SMALL, **fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, tmp_path: Path) -> None:
    assert difference(write(tmp_path, **VARIANTS[variant])) < TOLERANCE


def test_greedy_tokens(tmp_path: Path) -> None:
    assert_same_greedy_tokens(write(tmp_path))


def test_names_as_first_published(tmp_path: Path) -> None:
    """Without `transformer.`, with the causal mask among the tensors."""
    checkpoint = write(tmp_path)
    path = checkpoint / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    assert difference(checkpoint) < TOLERANCE
