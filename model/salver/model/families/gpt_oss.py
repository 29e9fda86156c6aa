"""GPT-OSS (OpenAI 2025): sinks, every second layer sliding, experts with biases and clamped activations."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import Copy, ExpertsSpec, Interleave, ModelSpec, Mxfp4, Source, Transpose
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
    quantization = c.section("quantization_config")
    if quantization is not None:
        quantization.only("quant_method", "mxfp4")
        quantization.ignore("modules_to_not_convert")
        quantization.refuse_unread()
    packed = quantization is not None
    for name in ("hidden_size", "intermediate_size") if packed else ():
        if c.size(name) % 32:
            raise c.error(name, f"({c.size(name)}) must be a multiple of the 32 values of a packed block")
    per_token = c.size("num_experts_per_tok", 4)
    c.only("experts_per_token", per_token)
    c.ignore("initial_context_length")
    return llama_spec(
        c,
        "GptOssForCausalLM",
        names=_names(c.size("intermediate_size"), packed),
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


def _names(inner: int, packed: bool) -> Names:
    """The experts of a layer are one tensor, [in, out], or [out, in] where it is packed to four bits.

    Gate and up stand row by row or column by column.
    """

    def whole(name: str, kind: str) -> Source:
        if kind == "bias":
            return Copy(f"{name}_bias")
        return Mxfp4(f"{name}_blocks", f"{name}_scales") if packed else Transpose(Copy(name))

    def up(kind: str) -> Source:
        return Interleave(whole(f"{MLP}.experts.gate_up_proj", kind), inner, 2, dim=1)

    def down(kind: str) -> Source:
        return whole(f"{MLP}.experts.down_proj", kind)

    return {
        **LLAMA,
        "sinks": lambda _: Copy("model.layers.{layer}.self_attn.sinks"),
        "experts.router": f"{MLP}.router",
        "experts.up": up,
        "experts.down": down,
    }
