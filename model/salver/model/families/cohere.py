"""Command R (Cohere 2024, 2025): attention and MLP side by side, rotary pairs, LayerNorm without a bias."""

from __future__ import annotations

from typing import Any

from ..config_reader import ConfigReader
from ..spec import Copy, HeadNorm, Interleave, ModelSpec, NormSpec, RopePositions, Source
from ..weight_names import Names, paired_qkv
from . import family
from .llama import LLAMA, head_size, llama_spec
from .windows import SLIDING, in_sliding_layers, layer_kinds


@family("CohereForCausalLM")
def cohere(c: ConfigReader) -> ModelSpec:
    norm = _norm(c)
    head_norm = HeadNorm(norm, "heads") if c.boolean("use_qk_norm", False) else None
    return llama_spec(c, "CohereForCausalLM", **_common(c), theta=500000.0, head_norm=head_norm)


@family("Cohere2ForCausalLM")
def cohere2(c: ConfigReader) -> ModelSpec:
    """Layers that see all have no positions."""
    pattern = c.size("sliding_window_pattern", 4)
    for name, value in _WRITTEN_OUT.items():
        c.only(name, value)
    c.only("layer_switch", pattern)

    def usual(layer: int) -> bool:
        return (layer + 1) % pattern != 0

    kinds = layer_kinds(c, c.size("num_hidden_layers"), usual)

    def ropes(rope: RopePositions, _: int) -> tuple[RopePositions | None, ...]:
        return tuple(rope if kind == SLIDING else None for kind in kinds)

    windows = in_sliding_layers(c, c.size_or_null("sliding_window", 4096), usual)
    return llama_spec(c, "Cohere2ForCausalLM", **_common(c), windows=windows, ropes=ropes)


# What published configs say beside the fields that transformers reads.
_WRITTEN_OUT: dict[str, Any] = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "use_qk_norm": False,
}


def _norm(c: ConfigReader) -> NormSpec:
    return NormSpec("layer", c.number("layer_norm_eps", 1e-5), bias=False)


def _common(c: ConfigReader) -> dict[str, Any]:
    attention_bias = c.boolean("attention_bias", False)
    c.ignore("model_max_length")
    return {
        "names": _names(c),
        "tied": True,
        "norm": _norm(c),
        "parallel": True,
        "shared_norm": True,
        "logit_multiplier": c.number("logit_scale", 0.0625),
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
    }


def _names(c: ConfigReader) -> Names:
    heads = c.size("num_attention_heads")
    kv_heads = c.size("num_key_value_heads", heads)
    head_dim = head_size(c, c.size("hidden_size"), heads)
    prefix = "model.layers.{layer}.self_attn"

    def columns(name: str, kind: str) -> Source:
        """Weights [heads, head_dim], in the order of the heads' dimensions."""
        return Interleave(Copy(f"{prefix}.{name}.{kind}"), head_dim // 2, 2, dim=1)

    return {
        **LLAMA,
        "qkv": paired_qkv(
            (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"), heads, kv_heads, head_dim, head_dim
        ),
        "query_norm": lambda kind: columns("q_norm", kind),
        "key_norm": lambda kind: columns("k_norm", kind),
    }
