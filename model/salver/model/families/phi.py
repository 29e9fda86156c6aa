"""Phi 1-2 (Gunasekar et al. 2023): attention and MLP side by side. Phi-3 (Abdin et al. 2024): a fused
Llama."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import HeadNorm, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import everywhere

PHI: Names = {
    **LLAMA,
    "query_norm": "model.layers.{layer}.self_attn.q_layernorm",
    "key_norm": "model.layers.{layer}.self_attn.k_layernorm",
    "attention_out": "model.layers.{layer}.self_attn.dense",
    "up": "model.layers.{layer}.mlp.fc1",
    "down": "model.layers.{layer}.mlp.fc2",
    "final_norm": "model.final_layernorm",
}
FUSED: Names = {
    **LLAMA,
    "qkv": "model.layers.{layer}.self_attn.qkv_proj",
    "up": "model.layers.{layer}.mlp.gate_up_proj",
}


@family("PhiForCausalLM")
def phi(c: ConfigReader) -> ModelSpec:
    c.only("tie_word_embeddings", False)  # the head has a bias of its own
    norm = NormSpec("layer", c.number("layer_norm_eps", 1e-5))
    return llama_spec(
        c,
        "PhiForCausalLM",
        names=PHI,
        partial=0.5,
        norm=norm,
        parallel=True,
        shared_norm=True,
        gated=False,
        activation=c.choice(
            "hidden_act", ("gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu"), "gelu_new"
        ),
        head_norm=HeadNorm(norm, "head") if c.boolean("qk_layernorm", False) else None,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


@family("Phi3ForCausalLM")
def phi3(c: ConfigReader) -> ModelSpec:
    for name in ("interpolate_factor", "full_attn_mod"):  # Phi-4-mini
        c.only(name, 1)
    c.ignore("original_max_position_embeddings")  # read where a scaling needs it
    return llama_spec(
        c,
        "Phi3ForCausalLM",
        names=FUSED,
        norm=NormSpec("rms", c.number("rms_norm_eps", 1e-5)),
        partial=1.0,
        # What the first releases called longrope.
        renamed_scalings={"su": "longrope", "yarn": "longrope"},
        windows=everywhere(c.size_or_null("sliding_window", None)),
        recomputed=True,
    )
