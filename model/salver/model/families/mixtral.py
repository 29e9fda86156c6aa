"""Mixtral (Jiang et al. 2024): Mistral with eight experts, two for each token."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ExpertsSpec, ModelSpec
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import everywhere

MIXTRAL: Names = {
    **LLAMA,
    "experts.router": "model.layers.{layer}.block_sparse_moe.gate",
    "experts.up": (
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
    ),
    "experts.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
}


@family("MixtralForCausalLM")
def mixtral(c: ConfigReader) -> ModelSpec:
    return llama_spec(
        c,
        "MixtralForCausalLM",
        names=MIXTRAL,
        # As transformers 5 calls its module, and adapters with it.
        renames=((r"(.*\.layers\.\d+)\.mlp\.gate\.(.+)", r"\1.block_sparse_moe.gate.\2"),),
        theta=1000000.0,
        windows=everywhere(c.size_or_null("sliding_window", None)),
        experts=ExpertsSpec(
            count=c.size(c.either("num_local_experts", "num_experts"), 8),
            per_token=c.size("num_experts_per_tok", 2),
            intermediate_size=c.size("intermediate_size"),
            normalized=True,
        ),
        expert_layers=tuple(range(c.size("num_hidden_layers"))),
    )
