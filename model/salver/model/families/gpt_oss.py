"""GPT-OSS (OpenAI 2025): sinks, every second layer sliding, experts with biases and clamped activations."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import Copy, ExpertsSpec, Interleave, ModelSpec, Source, Transpose
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import in_sliding_layers

MLP = "model.layers.{layer}.mlp"


@family("GptOssForCausalLM")
def gpt_oss(c: ConfigReader) -> ModelSpec:
    bias = c.boolean("attention_bias", True)
    c.only("swiglu_alpha", 1.702)
    c.only("hidden_act", "silu")
    per_token = c.size("num_experts_per_tok", 4)
    c.only("experts_per_token", per_token)
    c.ignore("initial_context_length")
    return llama_spec(
        c,
        "GptOssForCausalLM",
        names=_names(c.size("intermediate_size")),
        theta=150000.0,
        head_dim=c.size("head_dim", 64),
        windows=in_sliding_layers(c, c.size_or_null("sliding_window", 128), lambda layer: layer % 2 == 0),
        activation="quick_gelu",
        up_limit=c.number("swiglu_limit", 7.0),
        sinks=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        experts=ExpertsSpec(
            count=c.size(c.either("num_local_experts", "num_experts"), 128),
            per_token=per_token,
            intermediate_size=c.size("intermediate_size"),
            normalized=True,
            bias=True,
        ),
        expert_layers=tuple(range(c.size("num_hidden_layers"))),
    )


def _names(inner: int) -> Names:
    """The experts of a layer are one tensor, [in, out], with gate and up column by column."""

    def up(kind: str) -> Source:
        name = f"{MLP}.experts.gate_up_proj"
        source: Source = Transpose(Copy(name)) if kind == "weight" else Copy(f"{name}_bias")
        return Interleave(source, inner, 2, dim=1)

    def down(kind: str) -> Source:
        name = f"{MLP}.experts.down_proj"
        return Transpose(Copy(name)) if kind == "weight" else Copy(f"{name}_bias")

    return {
        **LLAMA,
        "sinks": lambda _: Copy("model.layers.{layer}.self_attn.sinks"),
        "experts.router": f"{MLP}.router",
        "experts.up": up,
        "experts.down": down,
    }
