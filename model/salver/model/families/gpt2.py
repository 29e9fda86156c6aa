"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, matrices stored [in, out]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config_reader import ConfigReader
from ..spec import ACTIVATIONS, LearnedPositions, ModelSpec, NormSpec
from ..weight_names import Names, transposed, with_weights
from . import family

GPT2: Names = {
    "embed": "wte",
    "positions": "wpe",
    "attention_norm": "h.{layer}.ln_1",
    "qkv": transposed("h.{layer}.attn.c_attn"),
    "attention_out": transposed("h.{layer}.attn.c_proj"),
    "mlp_norm": "h.{layer}.ln_2",
    "up": transposed("h.{layer}.mlp.c_fc"),
    "down": transposed("h.{layer}.mlp.c_proj"),
    "final_norm": "ln_f",
    "head": "lm_head",
}
MASKS = (
    r"h\.\d+\.attn\.((attention\.)?(masked_)?bias|causal_mask)",
)  # the causal mask, which early checkpoints saved


@family("GPT2LMHeadModel")
def gpt2(c: ConfigReader) -> ModelSpec:
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    return gpt_spec(c, "GPT2LMHeadModel", GPT2, optional_prefix="transformer.", ignored=MASKS)


@dataclass(frozen=True)
class Fields:
    """What a config calls the sizes of a GPT."""

    hidden_size: str = "n_embd"
    num_heads: str = "n_head"
    num_layers: str = "n_layer"
    intermediate_size: str = "n_inner"
    context: str = "n_positions"
    activation: str = "activation_function"
    norm_eps: str = "layer_norm_epsilon"


def gpt_spec(
    c: ConfigReader,
    architecture: str,
    names: Names,
    *,
    fields: Fields = Fields(),
    activation: str = "gelu_new",
    tied: bool = True,
    ignored: tuple[str, ...] = (),
    optional_prefix: str = "",
    renames: tuple[tuple[str, str], ...] = (),
    **differences: Any,
) -> ModelSpec:
    """The common shape: LayerNorm, a key head for each query head, a plain MLP, biases everywhere.

    `activation` and `tied` are what holds if the config does not say; `differences` are fields of ModelSpec.
    """
    hidden_size, num_heads = c.size(fields.hidden_size), c.size(fields.num_heads)
    if hidden_size % num_heads:
        raise c.error(fields.num_heads, f"({num_heads}) must divide {fields.hidden_size} ({hidden_size})")

    def field(name: str, read: Callable[[], Any]) -> Any:
        """A field of the config that the family may have read otherwise."""
        return differences.pop(name) if name in differences else read()

    spec = ModelSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=c.size(fields.num_layers),
        num_heads=num_heads,
        num_kv_heads=field("num_kv_heads", lambda: num_heads),
        head_dim=hidden_size // num_heads,
        intermediate_size=field(
            "intermediate_size", lambda: c.size(fields.intermediate_size, 4 * hidden_size)
        ),
        max_position_embeddings=field("max_position_embeddings", lambda: c.size(fields.context)),
        norm=field("norm", lambda: NormSpec("layer", c.number(fields.norm_eps, 1e-5))),
        positions=field("positions", LearnedPositions),
        activation=field("activation", lambda: c.choice(fields.activation, ACTIVATIONS, activation)),
        tied_head=field("tied_head", lambda: c.boolean("tie_word_embeddings", tied)),
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
        **{"gated": False, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, **differences},
    )
    return with_weights(spec, names, ignored=ignored, optional_prefix=optional_prefix, renames=renames)
