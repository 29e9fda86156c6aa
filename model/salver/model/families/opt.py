"""OPT (Zhang et al. 2022): learned positions from the third row on; OPT-350M with norms after the blocks."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import LearnedPositions, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .gpt2 import Fields, gpt_spec

PREFIX = "decoder.layers.{layer}"
OPT: Names = {
    "embed": "decoder.embed_tokens",
    "embed_in": "decoder.project_in",
    "embed_out": "decoder.project_out",
    "positions": "decoder.embed_positions",
    "attention_norm": f"{PREFIX}.self_attn_layer_norm",
    "qkv": (f"{PREFIX}.self_attn.q_proj", f"{PREFIX}.self_attn.k_proj", f"{PREFIX}.self_attn.v_proj"),
    "attention_out": f"{PREFIX}.self_attn.out_proj",
    "mlp_norm": f"{PREFIX}.final_layer_norm",
    "up": f"{PREFIX}.fc1",
    "down": f"{PREFIX}.fc2",
    "final_norm": "decoder.final_layer_norm",
    "head": "lm_head",
}
FIELDS = Fields(
    "hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim", "max_position_embeddings"
)


@family("OPTForCausalLM")
def opt(c: ConfigReader) -> ModelSpec:
    before, bias = c.boolean("do_layer_norm_before", True), c.boolean("enable_bias", True)
    embedding_size = c.size("word_embed_proj_dim", c.size("hidden_size"))
    return gpt_spec(
        c,
        "OPTForCausalLM",
        OPT,
        fields=FIELDS,
        activation="relu",
        optional_prefix="model.",
        positions=LearnedPositions(offset=2),
        norm=NormSpec("layer", 1e-5, weight=c.boolean("layer_norm_elementwise_affine", True)),
        norm_place="pre" if before else "post",
        final_norm=before and not c.boolean("_remove_final_layer_norm", False),
        embedding_size=None if embedding_size == c.size("hidden_size") else embedding_size,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
    )
