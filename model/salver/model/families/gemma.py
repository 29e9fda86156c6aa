"""Gemma 1-3 (Gemma Team 2024, 2025): norms around both blocks, soft caps, local and global layers."""

from __future__ import annotations

from typing import Any

from ..config_reader import ConfigReader
from ..rope_config import read_rope
from ..spec import ACTIVATIONS, HeadNorm, ModelSpec, NormSpec, RopePositions
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import FULL, SLIDING, in_sliding_layers, layer_kinds

SANDWICH: Names = {
    **LLAMA,
    "attention_out_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "mlp_out_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


@family("GemmaForCausalLM")
def gemma(c: ConfigReader) -> ModelSpec:
    activation = c.choice(c.either("hidden_activation", "hidden_act"), ACTIVATIONS, "gelu_pytorch_tanh")
    c.ignore("hidden_act", "hidden_activation")
    # The first release said gelu and meant its approximation, as transformers takes it.
    return llama_spec(
        c,
        "GemmaForCausalLM",
        **_common(c),
        activation="gelu_pytorch_tanh" if activation == "gelu" else activation,
    )


@family("Gemma2ForCausalLM")
def gemma2(c: ConfigReader) -> ModelSpec:
    return llama_spec(
        c,
        "Gemma2ForCausalLM",
        **_sandwich(c),
        windows=in_sliding_layers(c, c.size_or_null("sliding_window", 4096), lambda layer: layer % 2 == 0),
        score_cap=c.number_or_null("attn_logit_softcapping", 50.0) or 0.0,
        logit_cap=c.number_or_null("final_logit_softcapping", 30.0) or 0.0,
    )


@family("Gemma3ForCausalLM")
def gemma3(c: ConfigReader) -> ModelSpec:
    num_layers, pattern = c.size("num_hidden_layers"), c.size("sliding_window_pattern", 6)
    c.ignore("_sliding_window_pattern")
    c.only("attn_logit_softcapping", None)  # transformers reads it and leaves it

    def usual(layer: int) -> bool:
        return (layer + 1) % pattern != 0

    kinds = layer_kinds(c, num_layers, usual)
    head_dim = c.size("head_dim", 256)
    far, near = _ropes(c, head_dim)
    return llama_spec(
        c,
        "Gemma3ForCausalLM",
        **_sandwich(c),
        positions=far,
        windows=in_sliding_layers(c, c.size_or_null("sliding_window", 4096), usual),
        ropes=lambda rope, _: tuple(near if kind == SLIDING else rope for kind in kinds),
        head_norm=HeadNorm(_norm(c), "head"),
        logit_cap=c.number_or_null("final_logit_softcapping", None) or 0.0,
    )


def _norm(c: ConfigReader) -> NormSpec:
    return NormSpec("rms", c.number("rms_norm_eps", 1e-6), offset=1.0)


def _common(c: ConfigReader) -> dict[str, Any]:
    c.only("use_bidirectional_attention", False)
    attention_bias = c.boolean("attention_bias", False)
    return {
        "tied": True,
        "norm": _norm(c),
        "head_dim": c.size("head_dim", 256),
        "embedding_multiplier": c.size("hidden_size") ** 0.5,
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
    }


def _sandwich(c: ConfigReader) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    c.ignore("hidden_act", "sliding_window_size")
    return {
        **_common(c),
        "names": SANDWICH,
        "norm_place": "sandwich",
        "activation": c.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "attention_multiplier": c.number("query_pre_attn_scalar", 256) ** -0.5,
    }


def _ropes(c: ConfigReader, head_dim: int) -> tuple[RopePositions, RopePositions]:
    """Of layers that see all and of sliding ones, which have a theta of their own."""
    both = c.section("rope_parameters")
    if both is None:
        local = RopePositions(c.number("rope_local_base_freq", 10000.0))
        return read_rope(c, c.section("rope_scaling"), head_dim, theta=1000000.0), local
    c.only("rope_scaling", None)
    far = read_rope(c, both.section(FULL), head_dim, theta=1000000.0)
    near = read_rope(c, both.section(SLIDING), head_dim, theta=10000.0, theta_field="rope_local_base_freq")
    both.refuse_unread()
    return far, near
