"""GPT-Neo (Black et al. 2021): GPT-2 with every second layer local, scores not scaled."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec
from ..weight_names import Names
from . import family
from .gpt2 import GPT2, MASKS, Fields, gpt_spec

GPT_NEO: Names = {
    **GPT2,
    "qkv": (
        "h.{layer}.attn.attention.q_proj",
        "h.{layer}.attn.attention.k_proj",
        "h.{layer}.attn.attention.v_proj",
    ),
    "attention_out": "h.{layer}.attn.attention.out_proj",
    "up": "h.{layer}.mlp.c_fc",
    "down": "h.{layer}.mlp.c_proj",
}
FIELDS = Fields("hidden_size", "num_heads", "num_layers", "intermediate_size", "max_position_embeddings")


@family("GPTNeoForCausalLM")
def gpt_neo(c: ConfigReader) -> ModelSpec:
    window, context = c.size("window_size", 256), c.size("max_position_embeddings")
    windows = tuple(window if kind == "local" and window < context else None for kind in _kinds(c))
    return gpt_spec(
        c,
        "GPTNeoForCausalLM",
        GPT_NEO,
        fields=FIELDS,
        optional_prefix="transformer.",
        ignored=MASKS,
        windows=windows if any(windows) else (),
        attention_multiplier=1.0,
        qkv_bias=False,
    )


def _kinds(c: ConfigReader) -> tuple[str, ...]:
    """Of each layer, global or local: `attention_layers`, or `attention_types`, a list of [kinds, times]."""
    num_layers, kinds = c.size("num_layers"), ("global", "local")
    listed = c.listed("attention_layers", kinds, num_layers)
    runs = c.pairs("attention_types")
    if listed is not None:
        return listed
    if not runs:
        runs = ((["global", "local"], 12),)
    spelled = tuple(kind for run, times in runs for kind in list(run) * times)
    if len(spelled) != num_layers or not set(spelled) <= set(kinds):
        raise c.error("attention_types", f"must say global or local for each of {num_layers} layers")
    return spelled
