"""Llama 1-3, SmolLM and all that share their shape (Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config_reader import ConfigReader
from ..rope_config import grown_context, rope_positions
from ..spec import ACTIVATIONS, ModelSpec, NormSpec, RopePositions
from ..weight_names import Names, with_weights
from . import family

LLAMA: Names = {
    "embed": "model.embed_tokens",
    "attention_norm": "model.layers.{layer}.input_layernorm",
    "qkv": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj",
    ),
    "query_norm": "model.layers.{layer}.self_attn.q_norm",
    "key_norm": "model.layers.{layer}.self_attn.k_norm",
    "attention_out": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "down": "model.layers.{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


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
    c: ConfigReader,
    architecture: str,
    *,
    names: Names = LLAMA,
    tied: bool = False,
    theta: float = 10000.0,
    partial: float | None = None,
    ignored: tuple[str, ...] = (),
    renames: tuple[tuple[str, str], ...] = (),
    renamed_scalings: Mapping[str, str] | None = None,
    recomputed: bool = False,
    windows: Callable[[int, int], tuple[int | None, ...]] | None = None,
    ropes: Callable[[RopePositions, int], tuple[RopePositions | None, ...]] | None = None,
    **differences: Any,
) -> ModelSpec:
    """The common shape: RMSNorm, rotary positions, grouped queries, gated MLP, no biases.

    `tied`, `theta`, `partial` are what holds if the config does not say; `recomputed` is as in
    RopePositions. `windows` and `ropes` give what differs between layers, of (layers, context) and (the
    rotary positions read, layers). `differences` are fields of ModelSpec.
    """
    hidden_size, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    num_layers = c.size("num_hidden_layers")

    def field(name: str, read: Callable[[], Any]) -> Any:
        """A field of the config that the family may have read otherwise."""
        return differences.pop(name) if name in differences else read()

    head_dim = field("head_dim", lambda: head_size(c, hidden_size, num_heads))
    num_kv_heads = field("num_kv_heads", lambda: c.size("num_key_value_heads", num_heads))
    positions = field(
        "positions",
        lambda: rope_positions(c, head_dim, theta=theta, partial=partial, renamed=renamed_scalings),
    )
    if positions.scaling == "longrope":
        positions = replace(positions, recomputed=recomputed)
    context = grown_context(c.size("max_position_embeddings"), (positions,))
    biases = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=field("intermediate_size", lambda: c.size("intermediate_size")),
        max_position_embeddings=context,
        norm=field("norm", lambda: NormSpec("rms", c.number("rms_norm_eps", 1e-6))),
        positions=positions,
        activation=field("activation", lambda: c.choice("hidden_act", ACTIVATIONS, "silu")),
        tied_head=field("tied_head", lambda: c.boolean("tie_word_embeddings", tied)),
        gated=field("gated", lambda: True),
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
        windows=() if windows is None else windows(num_layers, context),
        ropes=() if ropes is None else ropes(positions, num_layers),
        **{**biases, **differences},
    )
    # Old transformers saved the frequencies; bodies that were saved alone lack the prefix.
    frequencies = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    prefixed = (r"^((?:layers|embed_tokens|norm|final_layernorm)\..*)", r"model.\1")
    return with_weights(spec, names, ignored=(frequencies, *ignored), renames=(prefixed, *renames))


def head_size(c: ConfigReader, hidden_size: int, num_heads: int, heads: str = "num_attention_heads") -> int:
    """`head_dim`, or what the heads share the hidden size into."""
    if not c.has("head_dim") and hidden_size % num_heads:
        raise c.error(heads, f"({num_heads}) must divide hidden_size ({hidden_size})")
    return c.size("head_dim", hidden_size // num_heads)
