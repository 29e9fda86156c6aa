"""Llama 1-3, SmolLM and all that share their shape (Touvron et al. 2023)."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import Cat, Copy, ModelSpec, NormSpec, RopePositions, Source, WeightMap
from . import family


@family("LlamaForCausalLM")
def llama(c: ConfigReader) -> ModelSpec:
    c.only("pretraining_tp", 1)
    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "LlamaForCausalLM",
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=c.boolean("mlp_bias", False),
    )


def llama_spec(
    c: ConfigReader, architecture: str, *, qkv_bias: bool, attention_out_bias: bool, mlp_bias: bool
) -> ModelSpec:
    """The common shape: RMSNorm, rotary positions, grouped queries, gated MLP."""
    hidden_size, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    num_kv_heads = c.size("num_key_value_heads", num_heads)
    if not c.has("head_dim") and hidden_size % num_heads:
        raise c.error("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden_size})")
    head_dim = c.size("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise c.error("head_dim", f"must be even for rotary positions, not {head_dim}")
    intermediate_size = c.size("intermediate_size")
    tied_head = c.boolean("tie_word_embeddings", False)

    def linear(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...], bias: bool) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for kind in ("weight", "bias") if bias else ("weight",):
            copies = tuple(Copy(f"model.layers.{{layer}}.{name}.{kind}") for name in theirs)
            source = copies[0] if len(copies) == 1 else Cat(copies, sizes)
            found[f"layers.{{layer}}.{ours}.{kind}"] = source
        return found

    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    tensors: dict[str, Source] = {
        "embed.weight": Copy("model.embed_tokens.weight"),
        "layers.{layer}.attention_norm.weight": Copy("model.layers.{layer}.input_layernorm.weight"),
        **linear("qkv", projections, (q, kv, kv), qkv_bias),
        **linear("attention_out", ("self_attn.o_proj",), (hidden_size,), attention_out_bias),
        "layers.{layer}.mlp_norm.weight": Copy("model.layers.{layer}.post_attention_layernorm.weight"),
        **linear("up", ("mlp.gate_proj", "mlp.up_proj"), (intermediate_size, intermediate_size), mlp_bias),
        **linear("down", ("mlp.down_proj",), (hidden_size,), mlp_bias),
        "final_norm.weight": Copy("model.norm.weight"),
    }
    if not tied_head:
        tensors["head.weight"] = Copy("lm_head.weight")
    return ModelSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=c.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=c.size("max_position_embeddings"),
        norm=NormSpec("rms", c.number("rms_norm_eps", 1e-6)),
        positions=rope_positions(c),
        activation=c.choice("hidden_act", ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"), "silu"),
        gated=True,
        qkv_bias=qkv_bias,
        attention_out_bias=attention_out_bias,
        mlp_bias=mlp_bias,
        tied_head=tied_head,
        weights=WeightMap(
            tensors,
            ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # old transformers saved it
            duplicates=(("lm_head.weight", "model.embed_tokens.weight"),) if tied_head else (),
        ),
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
    )


def rope_positions(c: ConfigReader) -> RopePositions:
    """From `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    parameters, old = c.section("rope_parameters"), c.section("rope_scaling")
    if parameters is not None and old is not None:
        raise c.error("rope_scaling", "stands beside rope_parameters; one of them was expected")
    theta_of = parameters if parameters is not None and parameters.has("rope_theta") else c
    theta = theta_of.number("rope_theta", 10000.0)
    if theta_of is not c:
        c.only("rope_theta", theta)
    section = parameters or old
    if section is None:
        return RopePositions(theta)
    section.only("partial_rotary_factor", 1.0)
    section.only("rope_theta", theta)
    kinds = ("default", "linear", "llama3")
    # Before `rope_type` it was called `type`; some checkpoints hold both.
    kind = section.choice("rope_type", kinds, section.choice("type", kinds, "default"))
    if kind == "linear":
        positions = RopePositions(theta, kind, factor=section.number("factor"))
    elif kind == "llama3":
        positions = RopePositions(
            theta,
            kind,
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_position_embeddings=section.size("original_max_position_embeddings"),
        )
        if positions.high_freq_factor <= positions.low_freq_factor:
            raise section.error("high_freq_factor", "must be above low_freq_factor")
    else:
        positions = RopePositions(theta)
        section.only("factor", 1.0)
    section.refuse_unread()
    return positions
