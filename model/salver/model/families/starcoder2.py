"""StarCoder 2 (Lozhkov et al. 2024): LayerNorm, biases, a plain MLP, a sliding window."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ACTIVATIONS, ModelSpec, NormSpec
from ..weight_names import Names
from . import family
from .llama import LLAMA, llama_spec
from .windows import everywhere

STARCODER2: Names = {
    **LLAMA,
    "up": "model.layers.{layer}.mlp.c_fc",
    "down": "model.layers.{layer}.mlp.c_proj",
}


@family("Starcoder2ForCausalLM")
def starcoder2(c: ConfigReader) -> ModelSpec:
    bias = c.boolean("use_bias", True)
    c.only("norm_type", "layer_norm")
    c.only("mlp_type", "default")
    c.ignore("activation_function", "layer_norm_epsilon", "scale_attn_weights")  # left from StarCoder 1
    return llama_spec(
        c,
        "Starcoder2ForCausalLM",
        names=STARCODER2,
        tied=True,
        norm=NormSpec("layer", c.number("norm_epsilon", 1e-5)),
        activation=c.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        windows=everywhere(c.size_or_null("sliding_window", None)),
        gated=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
    )
