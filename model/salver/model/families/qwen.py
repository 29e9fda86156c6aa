"""Qwen2, Qwen3 and their mixtures of experts (Yang et al. 2024, 2025)."""

from __future__ import annotations

from collections.abc import Callable

from ..config_reader import ConfigReader
from ..spec import ExpertsSpec, HeadNorm, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import Windows, everywhere, in_sliding_layers

MIXED: Names = {
    **LLAMA,
    "experts.router": "model.layers.{layer}.mlp.gate",
    "experts.up": (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    ),
    "experts.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj",
    "experts.shared_up": (
        "model.layers.{layer}.mlp.shared_expert.gate_proj",
        "model.layers.{layer}.mlp.shared_expert.up_proj",
    ),
    "experts.shared_down": "model.layers.{layer}.mlp.shared_expert.down_proj",
    "experts.shared_gate": "model.layers.{layer}.mlp.shared_expert_gate",
}


@family("Qwen2ForCausalLM")
def qwen2(c: ConfigReader) -> ModelSpec:
    return llama_spec(c, "Qwen2ForCausalLM", windows=_windows(c), qkv_bias=True)


@family("Qwen3ForCausalLM")
def qwen3(c: ConfigReader) -> ModelSpec:
    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "Qwen3ForCausalLM",
        windows=_windows(c),
        head_dim=c.size("head_dim", 128),
        head_norm=HeadNorm(NormSpec("rms", c.number("rms_norm_eps", 1e-6)), "head"),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
    )


@family("Qwen2MoeForCausalLM")
def qwen2_moe(c: ConfigReader) -> ModelSpec:
    sliding, last = c.boolean("use_sliding_window", False), c.integer("max_window_layers", 28)
    window = c.size_or_null("sliding_window", 4096) if sliding else None
    c.ignore("sliding_window")
    return llama_spec(
        c,
        "Qwen2MoeForCausalLM",
        names=MIXED,
        windows=in_sliding_layers(c, window, lambda layer: sliding and layer % 2 == 0 and layer < last),
        qkv_bias=c.boolean("qkv_bias", True),
        experts=ExpertsSpec(
            count=c.size("num_experts", 60),
            per_token=c.size("num_experts_per_tok", 4),
            intermediate_size=c.size("moe_intermediate_size", 1408),
            normalized=c.boolean("norm_topk_prob", False),
            shared_intermediate_size=c.size("shared_expert_intermediate_size", 5632),
            shared_gate=True,
        ),
        expert_layers=_expert_layers(c),
    )


@family("Qwen3MoeForCausalLM")
def qwen3_moe(c: ConfigReader) -> ModelSpec:
    window = c.size_or_null("sliding_window", 4096) if c.boolean("use_sliding_window", False) else None
    c.ignore("sliding_window", "max_window_layers")
    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "Qwen3MoeForCausalLM",
        names=MIXED,
        windows=everywhere(window),
        head_norm=HeadNorm(NormSpec("rms", c.number("rms_norm_eps", 1e-6)), "head"),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        experts=ExpertsSpec(
            count=c.size(c.either("num_experts", "num_local_experts"), 128),
            per_token=c.size("num_experts_per_tok", 8),
            intermediate_size=c.size("moe_intermediate_size", 768),
            normalized=c.boolean("norm_topk_prob", False),
        ),
        expert_layers=_expert_layers(c),
    )


def _windows(c: ConfigReader) -> Callable[[int, int], Windows]:
    """A window from layer `max_window_layers` on."""
    sliding, first = c.boolean("use_sliding_window", False), c.integer("max_window_layers", 28)
    window = c.size_or_null("sliding_window", 4096) if sliding else None
    c.ignore("sliding_window")
    return in_sliding_layers(c, window, lambda layer: sliding and window is not None and layer >= first)


def _expert_layers(c: ConfigReader) -> tuple[int, ...]:
    num_layers, step = c.size("num_hidden_layers"), c.size("decoder_sparse_step", 1)
    dense = c.indices("mlp_only_layers")
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)
