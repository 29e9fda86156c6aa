"""Small random checkpoints of every decoder family, in every variant that its config has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB, CONTEXT = 97, 128
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LLAMA: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GPT: dict[str, Any] = {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
NEO: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": CONTEXT,
    "window_size": 9,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
}
OPT: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": 32,
}
BLOOM: dict[str, Any] = {**COMMON, "hidden_size": 32, "n_layer": 3, "n_head": 4}
FALCON: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
MPT: dict[str, Any] = {**COMMON, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT}
XGLM: dict[str, Any] = {
    **COMMON,
    "d_model": 32,
    "ffn_dim": 40,
    "num_layers": 3,
    "attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
NEOX: dict[str, Any] = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 12}
MOE: dict[str, Any] = {
    **LLAMA,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
QWEN_MOE: dict[str, Any] = {**MOE, "moe_intermediate_size": 20}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


LINEAR = rope("linear", factor=3.0)
DYNAMIC = {**rope("dynamic", factor=3.0), "max_position_embeddings": 24}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=4.0)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
)
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]}
LONGROPE = rope("longrope", original_max_position_embeddings=24, factor=5.0, **LONG)


@dataclass(frozen=True)
class Variant:
    """A model class of transformers and the fields of its config."""

    model: str
    config: dict[str, Any]
    attention: str = "eager"  # which of transformers' implementations is right

    def config_of(self) -> Any:
        """transformers' config."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return getattr(transformers, self.model).config_class(**copy.deepcopy(self.config))

    def build(self) -> Any:
        """transformers' model with random weights."""
        import transformers

        config = self.config_of()
        config._attn_implementation = self.attention
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(config).eval()
        randomize(model)
        return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Weights so wide that whatever is wrong shows in the logits; norms and biases random, not 1 and 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name:
            parameter.normal_(1.0 if name.endswith("weight") and parameter.dim() <= 2 else 0.0, 0.3)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)


def _variants(model: str, base: dict[str, Any], **variants: dict[str, Any]) -> dict[str, Variant]:
    named = {"plain": {}, **variants}
    return {
        f"{model.removesuffix('ForCausalLM')} {name}": Variant(model, {**base, **fields})
        for name, fields in named.items()
    }


DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
OSS: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "swiglu_limit": 1.5,
}

VARIANTS: dict[str, Variant] = {
    **_variants(
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        yarn=rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=1.0, mscale_all_dim=0.8),
        whole_queries={"q_lora_rank": None, "attention_bias": True, "rope_interleave": False},
        halves={"n_shared_experts": 2, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    **_variants("GptOssForCausalLM", OSS, yarn=YARN),
    **_variants(
        "LlamaForCausalLM",
        LLAMA,
        linear=LINEAR,
        dynamic=DYNAMIC,
        yarn=YARN,
        longrope=LONGROPE,
        llama3=LLAMA3,
        biases={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    **_variants(
        "SmolLM3ForCausalLM",
        {**LLAMA, "no_rope_layer_interval": 2},
        sliding={"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 0]},
    ),
    **_variants("MistralForCausalLM", {**LLAMA, "sliding_window": 9}, none={"sliding_window": None}),
    **_variants(
        "Qwen2ForCausalLM",
        LLAMA,
        sliding={"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    **_variants("Qwen3ForCausalLM", {**LLAMA, "head_dim": 12}, biases={"attention_bias": True}),
    **_variants("GemmaForCausalLM", GEMMA),
    **_variants(
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "sliding_window": 9,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        uncapped={"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    **_variants(
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 7, "sliding_window_pattern": 2},
        scaled={
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    **_variants("PhiForCausalLM", LLAMA, qk={"qk_layernorm": True}),
    **_variants(
        "Phi3ForCausalLM",
        {**LLAMA, "original_max_position_embeddings": 24},
        longrope={"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}},
        window={"sliding_window": 9},
        partial={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        },
    ),
    **_variants("OlmoForCausalLM", LLAMA, clip={"clip_qkv": 0.9}),
    **_variants("Olmo2ForCausalLM", LLAMA),
    **_variants(
        "StableLmForCausalLM",
        {**LLAMA, "partial_rotary_factor": 0.5},
        biased={"use_qkv_bias": True},
        parallel={"use_parallel_residual": True},
        qk={"qk_layernorm": True},
    ),
    **_variants("Starcoder2ForCausalLM", LLAMA, window={"sliding_window": 9, "use_bias": False}),
    **_variants(
        "GraniteForCausalLM",
        {
            **LLAMA,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        },
    ),
    **_variants("CohereForCausalLM", {**LLAMA, "logit_scale": 0.6}, qk={"use_qk_norm": True}),
    **_variants(
        "Cohere2ForCausalLM", {**LLAMA, "logit_scale": 0.6, "sliding_window": 9, "sliding_window_pattern": 2}
    ),
    **_variants(
        "GlmForCausalLM",
        {
            **LLAMA,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    **_variants("Glm4ForCausalLM", {**LLAMA, "head_dim": 8}),
    **_variants(
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 6, "sliding_window": None},
        window={"sliding_window": 9},
    ),
    **_variants(
        "Qwen2MoeForCausalLM",
        {**QWEN_MOE, "shared_expert_intermediate_size": 24},
        normalized={"norm_topk_prob": True},
        mixed={"mlp_only_layers": [2], "qkv_bias": False},
        sliding={"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    **_variants(
        "Qwen3MoeForCausalLM",
        {**QWEN_MOE, "head_dim": 12},
        sparse={"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    **_variants("OlmoeForCausalLM", MOE, clip={"clip_qkv": 0.9, "norm_topk_prob": True}),
    **_variants("GPTNeoForCausalLM", NEO),
    **_variants("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, whole={"rotary_dim": 8}),
    **_variants("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}),
    **_variants(
        "GPTNeoXForCausalLM",
        {
            **NEOX,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        sequential={"use_parallel_residual": False, "attention_bias": False},
    ),
    **_variants("GPTBigCodeForCausalLM", GPT, heads={"multi_query": False}),
    **_variants(
        "OPTForCausalLM",
        OPT,
        post={"do_layer_norm_before": False, "word_embed_proj_dim": 20},
        bare={"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
    ),
    **_variants("XGLMForCausalLM", XGLM, unscaled={"scale_embedding": False}),
    **_variants("BloomForCausalLM", BLOOM, six={"n_head": 6, "hidden_size": 48}),
    **_variants(
        "FalconForCausalLM",
        FALCON,
        grouped={"new_decoder_architecture": True, "num_kv_heads": 2},
        one_norm={"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        linear=LINEAR,
    ),
    **{
        f"Falcon {name}": Variant(
            "FalconForCausalLM",
            {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, **fields},
            "sdpa",  # the other one adds ALiBi twice
        )
        for name, fields in {"alibi": {}, "alibi six": {"num_attention_heads": 6, "hidden_size": 48}}.items()
    },
    **_variants(
        "MptForCausalLM",
        MPT,
        six={"n_heads": 6, "d_model": 48},
        tuned={"attn_config": {"clip_qkv": 0.9, "softmax_scale": 0.2}},
    ),
}


def write(directory: Path, variant: Variant) -> Any:
    """The checkpoint of a variant; gives transformers' model."""
    model = variant.build()
    model.save_pretrained(directory)
    return model
