"""Granite 3 (Granite Team 2024): Llama with multipliers."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec
from . import family
from .llama import llama_spec


@family("GraniteForCausalLM")
def granite(c: ConfigReader) -> ModelSpec:
    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "GraniteForCausalLM",
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=c.boolean("mlp_bias", False),
        attention_multiplier=c.number("attention_multiplier", 1.0),
        embedding_multiplier=c.number("embedding_multiplier", 1.0),
        residual_multiplier=c.number("residual_multiplier", 1.0),
        logit_multiplier=1.0 / c.number("logits_scaling", 1.0),
    )
