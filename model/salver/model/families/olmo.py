"""OLMo 1 and 2, and OLMoE (Groeneveld et al. 2024, OLMo Team 2025, Muennighoff et al. 2024)."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ExpertsSpec, HeadNorm, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .qwen import MIXED

AFTER: Names = {
    **LLAMA,
    "attention_out_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp_out_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


@family("OlmoForCausalLM")
def olmo(c: ConfigReader) -> ModelSpec:
    """LayerNorm without weights."""
    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "OlmoForCausalLM",
        norm=NormSpec("layer", 1e-5, weight=False),
        qkv_clip=c.number_or_null("clip_qkv", None) or 0.0,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
    )


@family("Olmo2ForCausalLM")
def olmo2(c: ConfigReader) -> ModelSpec:
    """Norms of what the blocks give, and of all queries and all keys as one."""
    attention_bias = c.boolean("attention_bias", False)
    norm = NormSpec("rms", c.number("rms_norm_eps", 1e-5))
    return llama_spec(
        c,
        "Olmo2ForCausalLM",
        names=AFTER,
        norm=norm,
        norm_place="output",
        head_norm=HeadNorm(norm, "all"),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
    )


@family("OlmoeForCausalLM")
def olmoe(c: ConfigReader) -> ModelSpec:
    attention_bias = c.boolean("attention_bias", False)
    norm = NormSpec("rms", c.number("rms_norm_eps", 1e-5))
    return llama_spec(
        c,
        "OlmoeForCausalLM",
        names=MIXED,
        norm=norm,
        head_norm=HeadNorm(norm, "all"),
        qkv_clip=c.number_or_null("clip_qkv", None) or 0.0,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        experts=ExpertsSpec(
            count=c.size(c.either("num_experts", "num_local_experts"), 64),
            per_token=c.size("num_experts_per_tok", 8),
            intermediate_size=c.size("intermediate_size"),
            normalized=c.boolean("norm_topk_prob", False),
        ),
        expert_layers=tuple(range(c.size("num_hidden_layers"))),
    )
