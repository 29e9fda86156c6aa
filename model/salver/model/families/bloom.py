"""BLOOM (BigScience 2022): ALiBi, q, k, v head by head, a norm of the embeddings."""

from __future__ import annotations

import math

from ..config_reader import ConfigReader
from ..spec import AlibiPositions, ModelSpec, NormSpec
from ..weight_names import grouped_qkv
from . import family
from .gpt2 import Fields, gpt_spec

PREFIX = "h.{layer}"
# What published configs hold beside the fields that transformers reads.
WITHOUT_EFFECT = (
    "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi",
    "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "pretraining_tp",
)  # fmt: skip


@family("BloomForCausalLM")
def bloom(c: ConfigReader) -> ModelSpec:
    c.only("apply_residual_connection_post_layernorm", False)
    c.ignore(*WITHOUT_EFFECT)
    fields = Fields(
        hidden_size=c.either("hidden_size", "n_embed"),
        num_heads=c.either("n_head", "num_attention_heads"),
        num_layers=c.either("n_layer", "num_hidden_layers"),
        context="seq_length",
    )
    hidden_size, heads = c.size(fields.hidden_size), c.size(fields.num_heads)
    c.only("n_inner", 4 * hidden_size)
    return gpt_spec(
        c,
        "BloomForCausalLM",
        {
            "embed": "word_embeddings",
            "embedding_norm": "word_embeddings_layernorm",
            "attention_norm": f"{PREFIX}.input_layernorm",
            "qkv": grouped_qkv(
                f"{PREFIX}.self_attention.query_key_value", (hidden_size // heads,) * 3, heads
            ),
            "attention_out": f"{PREFIX}.self_attention.dense",
            "mlp_norm": f"{PREFIX}.post_attention_layernorm",
            "up": f"{PREFIX}.mlp.dense_h_to_4h",
            "down": f"{PREFIX}.mlp.dense_4h_to_h",
            "final_norm": "ln_f",
            "head": "lm_head",
        },
        fields=fields,
        optional_prefix="transformer.",
        # The positions have no end; what a config says is the length it was trained with.
        max_position_embeddings=c.size("seq_length", 2048),
        positions=AlibiPositions(alibi_slopes(heads)),
        embedding_norm=NormSpec("layer", c.number("layer_norm_epsilon", 1e-5)),
        activation="gelu_new",
        intermediate_size=4 * hidden_size,
    )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Of ALiBi's reference code: for a head count that is no power of two, those of the power below, and
    every second one of twice as many."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return tuple(slopes)
