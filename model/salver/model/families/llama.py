"""Llama 1-3, SmolLM and what shares their shape (Touvron et al. 2023)."""

from __future__ import annotations

from salver.model.config_reader import ConfigReader
from salver.model.families import family
from salver.model.spec import Cat, Copy, ModelSpec, RopeSpec, Source, WeightMap


def rope_spec(c: ConfigReader) -> RopeSpec:
    """From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which later configs use."""
    parameters = c.section("rope_parameters")
    scaling = c.section("rope_scaling")
    theta = c.number("rope_theta", 10000.0)
    if parameters is not None:
        theta = parameters.number("rope_theta", theta)
    section = parameters or scaling
    if section is None:
        return RopeSpec(theta)
    section.only("rope_theta", theta)
    section.only("partial_rotary_factor", None, 1, 1.0)
    old_name = section.string("type", "default")
    kind = section.string("rope_type", old_name)
    section.choice("rope_type", ("default", "linear", "llama3"), old_name)
    if kind == "default":
        spec = RopeSpec(theta)
    elif kind == "linear":
        spec = RopeSpec(theta, "linear", section.number("factor"))
    else:
        spec = RopeSpec(
            theta,
            "llama3",
            section.number("factor"),
            section.number("low_freq_factor"),
            section.number("high_freq_factor"),
            section.positive("original_max_position_embeddings"),
        )
    section.refuse_unknown()
    return spec


@family("LlamaForCausalLM")
def llama_spec(c: ConfigReader) -> ModelSpec:
    hidden_size, num_heads = c.positive("hidden_size"), c.positive("num_attention_heads")
    c.only("pretraining_tp", 1)
    c.only("rope_interleaved", False)
    attention_bias, mlp_bias = c.boolean("attention_bias", False), c.boolean("mlp_bias", False)
    tied_head = c.boolean("tie_word_embeddings", False)
    eos = c.token_ids("eos_token_id")
    bos = c.token_ids("bos_token_id")
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=c.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=c.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=c.positive("num_key_value_heads", num_heads),
        head_dim=c.positive("head_dim", hidden_size // num_heads),
        intermediate_size=c.positive("intermediate_size"),
        max_position_embeddings=c.positive("max_position_embeddings"),
        norm="rms",
        norm_eps=c.number("rms_norm_eps"),
        activation=c.choice("hidden_act", ("silu",), "silu"),
        gated=True,
        rope=rope_spec(c),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied_head=tied_head,
        weights=_weights(attention_bias, mlp_bias, tied_head),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
    )


def _weights(attention_bias: bool, mlp_bias: bool, tied_head: bool) -> WeightMap:
    layer = "model.layers.{layer}."

    def cat(*names: str) -> Source:
        return Cat(tuple(Copy(layer + name) for name in names))

    tensors: dict[str, Source] = {
        "embed.weight": Copy("model.embed_tokens.weight"),
        "layers.{layer}.attention_norm.weight": Copy(layer + "input_layernorm.weight"),
        "layers.{layer}.mlp_norm.weight": Copy(layer + "post_attention_layernorm.weight"),
        "final_norm.weight": Copy("model.norm.weight"),
    }
    parts = {
        "qkv": (attention_bias, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        "out": (attention_bias, ("self_attn.o_proj",)),
        "up": (mlp_bias, ("mlp.gate_proj", "mlp.up_proj")),
        "down": (mlp_bias, ("mlp.down_proj",)),
    }
    for ours, (has_bias, theirs) in parts.items():
        for kind in ("weight", "bias") if has_bias else ("weight",):
            names = [f"{name}.{kind}" for name in theirs]
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = (
                cat(*names) if len(names) > 1 else Copy(layer + names[0])
            )
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if tied_head:
        ignored.append(r"lm_head\.weight")
    else:
        tensors["head.weight"] = Copy("lm_head.weight")
    return WeightMap(tensors, tuple(ignored))
