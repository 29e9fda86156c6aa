"""DeepSeek-V3 (DeepSeek-AI 2024): latent attention, many experts in groups and a shared one."""

from __future__ import annotations

import math

from ..config_reader import ConfigReader
from ..rope_config import rope_positions
from ..spec import Copy, ExpertsSpec, Interleave, LatentAttention, ModelSpec, NormSpec, RopePositions, Source
from ..weight_names import Names
from . import family
from .llama import llama_spec
from .qwen import MIXED

ATTENTION = "model.layers.{layer}.self_attn"
MLP = "model.layers.{layer}.mlp"


@family("DeepseekV3ForCausalLM")
def deepseek_v3(c: ConfigReader) -> ModelSpec:
    heads, num_layers = c.size("num_attention_heads"), c.size("num_hidden_layers")
    rotary_dim, key_dim = c.size("qk_rope_head_dim"), c.size("qk_nope_head_dim")
    latent = LatentAttention(
        norm=NormSpec("rms", 1e-6),
        query_rank=0 if c.is_null("q_lora_rank") else c.size("q_lora_rank", 1536),
        latent_dim=c.size("kv_lora_rank"),
        rotary_dim=rotary_dim,
        key_dim=key_dim,
        value_dim=c.size("v_head_dim"),
    )
    for name, value in (
        ("num_key_value_heads", heads), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1), ("ep_size", 1), ("pretraining_tp", 1), ("head_dim", rotary_dim),
        ("qk_head_dim", key_dim + rotary_dim),
    ):  # fmt: skip
        c.only(name, value)
    c.ignore("aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers")
    rope = rope_positions(c, rotary_dim)
    first, bias = c.integer("first_k_dense_replace", 3), c.boolean("attention_bias", False)
    return llama_spec(
        c,
        "DeepseekV3ForCausalLM",
        names=_names(latent, heads, c.boolean("rope_interleave", True)),
        # Published checkpoints hold layers behind the last, which guess further tokens.
        ignored=tuple(rf"model\.layers\.{num_layers + extra}\..*" for extra in range(4)),
        positions=rope,
        num_kv_heads=1,
        head_dim=latent.latent_dim + rotary_dim,
        latent=latent,
        attention_multiplier=(key_dim + rotary_dim) ** -0.5 * _mscale(c, rope) ** 2,
        qkv_bias=bias,
        attention_out_bias=bias,
        experts=ExpertsSpec(
            count=c.size(c.either("n_routed_experts", "num_local_experts")),
            per_token=c.size("num_experts_per_tok", 8),
            intermediate_size=c.size("moe_intermediate_size"),
            scores="sigmoid",
            normalized=c.boolean("norm_topk_prob", True),
            scale=c.number("routed_scaling_factor", 2.5),
            correction=True,
            groups=c.size("n_group", 8),
            groups_per_token=c.size("topk_group", 4),
            shared_intermediate_size=c.size("moe_intermediate_size") * c.size("n_shared_experts", 1),
        ),
        expert_layers=tuple(range(first, num_layers)),
    )


def _mscale(c: ConfigReader, rope: RopePositions) -> float:
    """What a scaled rope adds to the scale of the scores."""
    section = c.section("rope_parameters") or c.section("rope_scaling")
    if section is None or rope.scaling == "default" or rope.factor <= 1:
        return 1.0
    return 0.1 * section.number("mscale_all_dim", 0.0, zero=True) * math.log(rope.factor) + 1.0


def _names(latent: LatentAttention, heads: int, paired: bool) -> Names:
    half = latent.rotary_dim // 2

    def turned(name: str, groups: int, lead: int) -> Source:
        source = Copy(name)
        return Interleave(source, half, 2, groups, lead=lead) if paired else source

    queries = "q_b_proj" if latent.query_rank else "q_proj"
    return {
        **MIXED,
        "latent.query_down": f"{ATTENTION}.q_a_proj",
        "latent.query_norm": f"{ATTENTION}.q_a_layernorm",
        "latent.query_up": lambda kind: turned(f"{ATTENTION}.{queries}.{kind}", heads, latent.key_dim),
        "latent.down": lambda kind: turned(f"{ATTENTION}.kv_a_proj_with_mqa.{kind}", 1, latent.latent_dim),
        "latent.norm": f"{ATTENTION}.kv_a_layernorm",
        "latent.up": f"{ATTENTION}.kv_b_proj",
        "experts.correction": lambda _: Copy(f"{MLP}.gate.e_score_correction_bias"),
        "experts.shared_up": (f"{MLP}.shared_experts.gate_proj", f"{MLP}.shared_experts.up_proj"),
        "experts.shared_down": f"{MLP}.shared_experts.down_proj",
    }
