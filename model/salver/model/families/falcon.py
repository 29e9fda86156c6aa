"""Falcon (Almazrouei et al. 2023) in its three forms: attention and MLP side by side with one key head (7B),
with several and two norms (40B), and one after the other with ALiBi (RW)."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..rope_config import rope_positions
from ..spec import AlibiPositions, ModelSpec, RopePositions
from ..weight_names import Names, grouped_qkv
from . import family
from .bloom import alibi_slopes
from .gpt2 import Fields, gpt_spec

PREFIX = "h.{layer}"


@family("FalconForCausalLM")
def falcon(c: ConfigReader) -> ModelSpec:
    fields = Fields(
        hidden_size=c.either("hidden_size", "n_embed"),
        num_heads=c.either("num_attention_heads", "n_head"),
        num_layers=c.either("num_hidden_layers", "n_layer"),
        intermediate_size="ffn_hidden_size",
        context="max_position_embeddings",
        activation="activation",
    )
    c.ignore("ff_factor")
    c.only("apply_residual_connection_post_layernorm", False)
    heads = c.size(fields.num_heads)
    grouped, bias = c.boolean("new_decoder_architecture", False), c.boolean("bias", False)
    if grouped:
        c.only("parallel_attn", True)
    parallel = c.boolean("parallel_attn", True)
    norms = c.size("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > 2 or (norms == 2 and not grouped):
        raise c.error("num_ln_in_parallel_attn", f"is {norms}, which is not supported for this architecture")
    multi_query = c.boolean("multi_query", True)
    kv_heads = c.size(c.either("num_kv_heads", "n_head_kv"), heads)
    if not grouped:
        kv_heads = 1 if multi_query else heads
    two_norms = norms == 2 or not parallel
    return gpt_spec(
        c,
        "FalconForCausalLM",
        _names(heads, kv_heads, c.size(fields.hidden_size) // heads, norms),
        fields=fields,
        activation="gelu",
        optional_prefix="transformer.",
        ignored=(r"h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
        num_kv_heads=kv_heads,
        max_position_embeddings=c.size("max_position_embeddings", 2048),
        positions=_positions(c, heads, c.size(fields.hidden_size) // heads),
        parallel=parallel,
        shared_norm=not two_norms,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
    )


def _positions(c: ConfigReader, heads: int, head_dim: int) -> AlibiPositions | RopePositions:
    if not c.boolean("alibi", False):
        return rope_positions(c, head_dim)
    c.ignore("rope_theta", "rope_scaling", "rope_parameters")
    return AlibiPositions(alibi_slopes(heads), head_dim**-0.5, rounded=True)


def _names(heads: int, kv_heads: int, head_dim: int, norms: int) -> Names:
    group = heads // kv_heads * head_dim
    return {
        "embed": "word_embeddings",
        "attention_norm": f"{PREFIX}.{'ln_attn' if norms == 2 else 'input_layernorm'}",
        "qkv": grouped_qkv(f"{PREFIX}.self_attention.query_key_value", (group, head_dim, head_dim), kv_heads),
        "attention_out": f"{PREFIX}.self_attention.dense",
        "mlp_norm": f"{PREFIX}.{'ln_mlp' if norms == 2 else 'post_attention_layernorm'}",
        "up": f"{PREFIX}.mlp.dense_h_to_4h",
        "down": f"{PREFIX}.mlp.dense_4h_to_h",
        "final_norm": "ln_f",
        "head": "lm_head",
    }
