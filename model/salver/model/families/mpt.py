"""MPT (MosaicML 2023): ALiBi with slopes of its own, LayerNorm without a bias, no biases at all."""

from __future__ import annotations

import math

from ..config_reader import ConfigReader
from ..spec import AlibiPositions, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .gpt2 import Fields, gpt_spec

PREFIX = "blocks.{layer}"
MPT: Names = {
    "embed": "wte",
    "attention_norm": f"{PREFIX}.norm_1",
    "qkv": f"{PREFIX}.attn.Wqkv",
    "attention_out": f"{PREFIX}.attn.out_proj",
    "mlp_norm": f"{PREFIX}.norm_2",
    "up": f"{PREFIX}.ffn.up_proj",
    "down": f"{PREFIX}.ffn.down_proj",
    "final_norm": "norm_f",
    "head": "lm_head",
}
FIELDS = Fields("d_model", "n_heads", "n_layers", context="max_seq_len")


@family("MPTForCausalLM", "MptForCausalLM")
def mpt(c: ConfigReader) -> ModelSpec:
    for name, value in (
        ("no_bias", True), ("expansion_ratio", 4), ("embedding_fraction", 1.0), ("logit_scale", None),
        ("norm_type", "low_precision_layernorm"),
    ):  # fmt: skip
        c.only(name, value)
    # With ALiBi there are no learned positions, whatever this says.
    c.ignore("learned_pos_emb", "init_config", "init_device", "tokenizer_name", "verbose")
    attention = c.section("attn_config") or ConfigReader({}, "attn_config")
    for name, value in (
        ("attn_type", "multihead_attention"), ("prefix_lm", False), ("qk_ln", False), ("alibi", True),
        ("attn_uses_sequence_id", False), ("alibi_bias_max", 8),
    ):  # fmt: skip
        attention.only(name, value)
    attention.ignore("attn_impl", "attn_pdrop")
    scale = attention.number_or_null("softmax_scale", None)
    clip = attention.number_or_null("clip_qkv", None) or 0.0
    slopes = mpt_slopes(c.size("n_heads"))
    attention.refuse_unread()
    return gpt_spec(
        c,
        "MPTForCausalLM",
        MPT,
        fields=FIELDS,
        optional_prefix="transformer.",
        positions=AlibiPositions(slopes),
        norm=NormSpec("layer", c.number("layer_norm_epsilon", 1e-5), bias=False),
        activation="gelu",
        intermediate_size=4 * c.size("d_model"),
        attention_multiplier=scale,
        qkv_clip=clip,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    )


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """For a head count that is no power of two: every second one of the next power's, then the others."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    if power != num_heads:
        slopes = slopes[1::2] + slopes[::2]
    return tuple(slopes[:num_heads])
