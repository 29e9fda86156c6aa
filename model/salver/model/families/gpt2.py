"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, matrices stored [in, out]."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ACTIVATIONS, Copy, LearnedPositions, ModelSpec, NormSpec, Source, Transpose, WeightMap
from . import family

_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_PRODUCTS = {"qkv": "attn.c_attn", "attention_out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


@family("GPT2LMHeadModel")
def gpt2(c: ConfigReader) -> ModelSpec:
    hidden_size, num_heads = c.size("n_embd"), c.size("n_head")
    if hidden_size % num_heads:
        raise c.error("n_head", f"({num_heads}) must divide n_embd ({hidden_size})")
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    tied_head = c.boolean("tie_word_embeddings", True)
    return ModelSpec(
        architecture="GPT2LMHeadModel",
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=c.size("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=c.size("n_inner", 4 * hidden_size),
        max_position_embeddings=c.size("n_positions"),
        norm=NormSpec("layer", c.number("layer_norm_epsilon", 1e-5)),
        positions=LearnedPositions(),
        activation=c.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_head=tied_head,
        weights=_weights(tied_head),
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
    )


def _weights(tied_head: bool) -> WeightMap:
    tensors: dict[str, Source] = {"embed.weight": Copy("wte.weight"), "positions.weight": Copy("wpe.weight")}
    for kind in ("weight", "bias"):
        tensors[f"final_norm.{kind}"] = Copy(f"ln_f.{kind}")
        for ours, theirs in _NORMS.items():
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = Copy(f"h.{{layer}}.{theirs}.{kind}")
        for ours, theirs in _PRODUCTS.items():
            source = Copy(f"h.{{layer}}.{theirs}.{kind}")
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = Transpose(source) if kind == "weight" else source
    if not tied_head:
        tensors["head.weight"] = Copy("lm_head.weight")
    return WeightMap(
        tensors,
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),  # the causal mask, which early checkpoints saved
        duplicates=(("lm_head.weight", "wte.weight"),) if tied_head else (),
        optional_prefix="transformer.",
    )
