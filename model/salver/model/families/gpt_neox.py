"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): attention and MLP side by side, each with
a norm; q, k, v head by head."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..rope_config import grown_context, rope_positions
from ..spec import ModelSpec
from ..weight_names import grouped_qkv
from . import family
from .gpt2 import Fields, gpt_spec

FIELDS = Fields(
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip


@family("GPTNeoXForCausalLM")
def gpt_neox(c: ConfigReader) -> ModelSpec:
    c.only("is_decoder", False)
    heads = c.size("num_attention_heads")
    head_dim = c.size("hidden_size") // heads
    rope = rope_positions(
        c, head_dim, theta_field=c.either("rotary_emb_base", "rope_theta"), partial=0.25,
        partial_field=c.either("rotary_pct", "partial_rotary_factor"),
    )  # fmt: skip
    attention_bias = c.boolean("attention_bias", True)
    prefix = "gpt_neox.layers.{layer}"
    return gpt_spec(
        c,
        "GPTNeoXForCausalLM",
        {
            "embed": "gpt_neox.embed_in",
            "attention_norm": f"{prefix}.input_layernorm",
            "qkv": grouped_qkv(f"{prefix}.attention.query_key_value", (head_dim,) * 3, heads),
            "attention_out": f"{prefix}.attention.dense",
            "mlp_norm": f"{prefix}.post_attention_layernorm",
            "up": f"{prefix}.mlp.dense_h_to_4h",
            "down": f"{prefix}.mlp.dense_4h_to_h",
            "final_norm": "gpt_neox.final_layer_norm",
            "head": "lm_head",
        },
        fields=FIELDS,
        activation="gelu",
        tied=False,
        ignored=(r"gpt_neox\.layers\.\d+\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)",),
        renames=(
            (r"^embed_out\.weight", "lm_head.weight"),
            (r"^((?:layers|embed_in|final_layer_norm)\..*)", r"gpt_neox.\1"),  # a body that was saved alone
        ),
        max_position_embeddings=grown_context(c.size("max_position_embeddings"), (rope,)),
        positions=rope,
        parallel=c.boolean("use_parallel_residual", True),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
    )
