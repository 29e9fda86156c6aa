"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, matrices stored [in, out]."""

from __future__ import annotations

from salver.model.config_reader import ConfigReader
from salver.model.families import family
from salver.model.spec import Copy, ModelSpec, Source, Transpose, WeightMap


@family("GPT2LMHeadModel")
def gpt2_spec(c: ConfigReader) -> ModelSpec:
    hidden_size, num_heads = c.positive("n_embd"), c.positive("n_head")
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    tied_head = c.boolean("tie_word_embeddings", True)
    bos = c.token_ids("bos_token_id")
    return ModelSpec(
        architecture="GPT2LMHeadModel",
        vocab_size=c.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=c.positive("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=c.positive("n_inner", 4 * hidden_size),
        max_position_embeddings=c.positive("n_positions"),
        norm="layer",
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        activation=c.choice("activation_function", ("gelu_new", "gelu", "relu", "silu"), "gelu_new"),
        gated=False,
        rope=None,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_head=tied_head,
        weights=_weights(tied_head),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=c.token_ids("eos_token_id"),
    )


def _weights(tied_head: bool) -> WeightMap:
    tensors: dict[str, Source] = {
        "embed.weight": Copy("transformer.wte.weight"),
        "positions.weight": Copy("transformer.wpe.weight"),
    }
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    products = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        tensors[f"final_norm.{kind}"] = Copy(f"transformer.ln_f.{kind}")
        for ours, theirs in norms.items():
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = Copy(f"transformer.h.{{layer}}.{theirs}.{kind}")
        for ours, theirs in products.items():
            source = Copy(f"transformer.h.{{layer}}.{theirs}.{kind}")
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = Transpose(source) if kind == "weight" else source
    ignored = [r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"]
    if tied_head:
        ignored.append(r"lm_head\.weight")
    else:
        tensors["head.weight"] = Copy("lm_head.weight")
    return WeightMap(tensors, tuple(ignored), optional_prefix="transformer.")
