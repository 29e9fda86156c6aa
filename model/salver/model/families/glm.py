"""GLM-4 (GLM Team 2024): rotary pairs in half of each head, a fused MLP; GLM-4-0414: norms on both sides."""

from __future__ import annotations

from typing import Any

from ..config_reader import ConfigReader
from ..spec import ModelSpec
from ..weight_names import Names, paired_qkv
from . import family
from .llama import LLAMA, llama_spec


@family("GlmForCausalLM")
def glm(c: ConfigReader) -> ModelSpec:
    return llama_spec(c, "GlmForCausalLM", **_common(c))


@family("Glm4ForCausalLM")
def glm4(c: ConfigReader) -> ModelSpec:
    return llama_spec(c, "Glm4ForCausalLM", **_common(c), norm_place="sandwich")


def _common(c: ConfigReader) -> dict[str, Any]:
    heads, head_dim = c.size("num_attention_heads"), c.size("head_dim", 128)
    section = c.section("rope_parameters")
    partial = c.fraction("partial_rotary_factor", 0.5)
    if section is not None:
        partial = section.fraction("partial_rotary_factor", partial)
    prefix = "model.layers.{layer}.self_attn"
    names: Names = {
        **LLAMA,
        "qkv": paired_qkv(
            (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"),
            heads,
            c.size("num_key_value_heads", 2),
            head_dim,
            int(head_dim * partial),
        ),
        "up": "model.layers.{layer}.mlp.gate_up_proj",
        "attention_out_norm": "model.layers.{layer}.post_self_attn_layernorm",
        "mlp_out_norm": "model.layers.{layer}.post_mlp_layernorm",
    }
    return {
        "names": names,
        "partial": 0.5,
        "head_dim": head_dim,
        "num_kv_heads": c.size("num_key_value_heads", 2),
        "qkv_bias": c.boolean("attention_bias", True),
    }
