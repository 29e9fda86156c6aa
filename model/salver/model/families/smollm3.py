"""SmolLM3: Llama with layers that have no positions (NoPE; Kazemnejad et al. 2023)."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec, RopePositions
from . import family
from .llama import llama_spec
from .windows import in_sliding_layers


@family("SmolLM3ForCausalLM")
def smollm3(c: ConfigReader) -> ModelSpec:
    num_layers, interval = c.size("num_hidden_layers"), c.size("no_rope_layer_interval", 4)
    # The list says 1 for layers that do rotate.
    rotated = c.listed("no_rope_layers", (0, 1), num_layers) or tuple(
        int((layer + 1) % interval != 0) for layer in range(num_layers)
    )
    sliding = c.boolean("use_sliding_window", False)
    window = c.size_or_null("sliding_window", None) if sliding else None
    c.ignore("sliding_window", "layer_types", "max_window_layers", "pretraining_tp")

    def ropes(rope: RopePositions, count: int) -> tuple[RopePositions | None, ...]:
        return tuple(rope if rotates else None for rotates in rotated) if 0 in rotated else ()

    attention_bias = c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "SmolLM3ForCausalLM",
        tied=True,
        theta=2000000.0,
        windows=in_sliding_layers(c, window, lambda layer: not rotated[layer]) if window else None,
        ropes=ropes,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=c.boolean("mlp_bias", False),
    )
