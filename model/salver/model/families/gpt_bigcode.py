"""GPT-BigCode (Ben Allal et al. 2023): GPT-2 with one key head for all queries."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec
from ..weight_names import grouped_qkv
from . import family
from .gpt2 import GPT2, MASKS, gpt_spec


@family("GPTBigCodeForCausalLM")
def gpt_bigcode(c: ConfigReader) -> ModelSpec:
    c.only("add_cross_attention", False)
    c.only("scale_attn_weights", True)
    # Of a runner of its own, which transformers had once.
    c.ignore("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length")
    c.ignore("pre_allocate_kv_cache", "validate_runner_input")
    heads = c.size("n_head")
    multi_query = c.boolean("multi_query", True)
    c.only("num_key_value_heads", 1 if multi_query else heads)
    fused = "h.{layer}.attn.c_attn"
    by_head = grouped_qkv(fused, (c.size("n_embd") // heads,) * 3, heads)
    names = {
        **GPT2,
        "qkv": fused if multi_query else by_head,
        "attention_out": "h.{layer}.attn.c_proj",
        "up": "h.{layer}.mlp.c_fc",
        "down": "h.{layer}.mlp.c_proj",
    }
    return gpt_spec(
        c,
        "GPTBigCodeForCausalLM",
        names,
        activation="gelu_pytorch_tanh",
        optional_prefix="transformer.",
        ignored=MASKS,
        num_kv_heads=1 if multi_query else heads,
    )
