"""StableLM 2 and 3B (Bellagamba et al. 2024): LayerNorm, partly rotated heads."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import Copy, HeadNorm, ModelSpec, NormSpec, Source, Stack
from . import family
from .llama import LLAMA, llama_spec


@family("StableLmForCausalLM")
def stablelm(c: ConfigReader) -> ModelSpec:
    eps = c.number("layer_norm_eps", 1e-5)
    parallel = c.boolean("use_parallel_residual", False)
    head_norm = (
        HeadNorm(NormSpec("layer", eps, bias=False), "heads") if c.boolean("qk_layernorm", False) else None
    )
    heads = c.size("num_attention_heads")
    kv_heads = c.size("num_key_value_heads", heads)

    def own(name: str, count: int, kind: str) -> Source:
        prefix = f"model.layers.{{layer}}.self_attn.{name}.norms"
        return Stack(tuple(Copy(f"{prefix}.{head}.{kind}") for head in range(count)))

    return llama_spec(
        c,
        "StableLmForCausalLM",
        names={
            **LLAMA,
            "query_norm": lambda kind: own("q_layernorm", heads, kind),
            "key_norm": lambda kind: own("k_layernorm", kv_heads, kind),
        },
        partial=0.25,
        norm=NormSpec("layer", eps),
        parallel=parallel,
        shared_norm=parallel,
        head_norm=head_norm,
        qkv_bias=c.boolean("use_qkv_bias", False),
    )
