"""XGLM (Lin et al. 2021): sinusoidal positions, embeddings multiplied by the root of their size."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec, NormSpec, SinusoidalPositions
from ..weight_names import Names
from . import family
from .gpt2 import Fields, gpt_spec

PREFIX = "model.layers.{layer}"
XGLM: Names = {
    "embed": "model.embed_tokens",
    "attention_norm": f"{PREFIX}.self_attn_layer_norm",
    "qkv": (f"{PREFIX}.self_attn.q_proj", f"{PREFIX}.self_attn.k_proj", f"{PREFIX}.self_attn.v_proj"),
    "attention_out": f"{PREFIX}.self_attn.out_proj",
    "mlp_norm": f"{PREFIX}.final_layer_norm",
    "up": f"{PREFIX}.fc1",
    "down": f"{PREFIX}.fc2",
    "final_norm": "model.layer_norm",
    "head": "lm_head",
}
FIELDS = Fields("d_model", "attention_heads", "num_layers", "ffn_dim", "max_position_embeddings")


@family("XGLMForCausalLM")
def xglm(c: ConfigReader) -> ModelSpec:
    c.only("add_cross_attention", False)
    return gpt_spec(
        c,
        "XGLMForCausalLM",
        XGLM,
        fields=FIELDS,
        activation="gelu",
        ignored=(r"model\.embed_positions\.weights",),
        positions=SinusoidalPositions(offset=2, zero=c.token_id("pad_token_id")),
        norm=NormSpec("layer", 1e-5),
        embedding_multiplier=c.size("d_model") ** 0.5 if c.boolean("scale_embedding", True) else 1.0,
    )
