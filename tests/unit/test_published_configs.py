"""The config.json of published checkpoints is understood: every field that stands in one, and what it means.

As the models' makers wrote them, with fewer layers where a list would be long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salver.model.config_reader import read_spec
from salver.model.errors import CheckpointError
from salver.model.spec import ModelSpec, RopePositions

SUMMARY: dict[str, Any] = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
SAVED: dict[str, Any] = {
    "_name_or_path": "somewhere", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    **SAVED, **SUMMARY, "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05, "n_inner": None, "scale_attn_weights": True,
}  # fmt: skip
MODERN: dict[str, Any] = {
    **SAVED, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
LAYERNORM: dict[str, Any] = {k: v for k, v in MODERN.items() if k != "rms_norm_eps"} | {
    "layer_norm_eps": 1e-5
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-neo-1.3B": {
        **SAVED, **SUMMARY, "architectures": ["GPTNeoForCausalLM"], "activation_function": "gelu_new",
        "attention_dropout": 0, "attention_layers": ["global", "local"] * 2,
        "attention_types": [[["global", "local"], 2]], "embed_dropout": 0, "gradient_checkpointing": False,
        "hidden_size": 2048, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 16, "num_layers": 4,
        "resid_dropout": 0, "task_specific_params": {"text-generation": {"do_sample": True}},
        "tokenizer_class": "GPT2Tokenizer", "vocab_size": 50257, "window_size": 256,
    },
    "gpt-j-6b": {
        **GPT, "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "n_embd": 4096, "n_head": 16,
        "n_layer": 28, "n_positions": 2048, "rotary": True, "rotary_dim": 64, "tie_word_embeddings": False,
        "task_specific_params": {"text-generation": {"do_sample": True}}, "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": 50400,
    },
    "codegen-350M-mono": {
        **GPT, "architectures": ["CodeGenForCausalLM"], "model_type": "codegen", "n_ctx": 2048,
        "n_embd": 1024,
        "n_head": 16, "n_layer": 20, "n_positions": 2048, "rotary_dim": 32, "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer", "vocab_size": 51200,
    },
    "pythia-70m": {
        **SAVED, "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 512,
        "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "opt-350m": {
        **SAVED, "architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": False,
        "activation_dropout": 0.0, "activation_function": "relu", "attention_dropout": 0.0,
        "do_layer_norm_before": False, "dropout": 0.1, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16,
        "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>", "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "starcoder": {
        **GPT, "architectures": ["GPTBigCodeForCausalLM"], "attention_softmax_in_fp32": True,
        "inference_runner": 0, "max_batch_size": None, "max_sequence_length": None,
        "model_type": "gpt_bigcode",
        "multi_query": True, "n_embd": 6144, "n_head": 48, "n_layer": 40, "n_positions": 8192,
        "pad_key_length": True, "pre_allocate_kv_cache": False, "scale_attention_softmax_in_fp32": True,
        "validate_runner_input": True, "vocab_size": 49152,
    },
    "bloom-560m": {
        **SAVED, "architectures": ["BloomForCausalLM"], "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
        "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True,
        "skip_bias_add_qkv": False, "slow_but_exact": False, "unk_token_id": 0, "vocab_size": 250880,
    },
    "falcon-7b": {
        **SAVED, "architectures": ["FalconForCausalLM"], "alibi": False,
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "auto_map": {"a": "b"},
        "bias": False, "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
        "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024,
    },
    "mpt-7b": {
        "architectures": ["MPTForCausalLM"], "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
            "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        "auto_map": {"a": "b"}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0,
        "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": True,
        "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32,
        "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "x/y",
        "torch_dtype": "bfloat16", "use_cache": False, "verbose": 0, "vocab_size": 50432,
    },
    "xglm-564M": {
        **SAVED, "architectures": ["XGLMForCausalLM"], "activation_dropout": 0, "activation_function": "gelu",
        "attention_dropout": 0.1, "attention_heads": 16, "d_model": 1024, "decoder_start_token_id": 2,
        "dropout": 0.1, "ffn_dim": 4096, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "model_type": "xglm", "num_layers": 24, "pad_token_id": 1, "scale_embedding": True,
        "vocab_size": 256008,
    },
    "SmolLM3-3B": {
        **MODERN, "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
        "layer_types": ["full_attention"] * 4, "max_window_layers": 28, "mlp_bias": False,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2,
        "rope_scaling": None,
        "sliding_window": None, "use_sliding_window": False,
    },
    "Mistral-7B-v0.1": {**MODERN, "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    "Qwen2-0.5B": {
        **MODERN, "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 24, "sliding_window": 131072,
        "use_mrope": False, "use_sliding_window": False,
    },
    "Qwen3-0.6B": {
        **MODERN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "max_window_layers": 28, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    },
    "Qwen3-4B with yarn": {
        **MODERN, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "max_position_embeddings": 32768,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "Qwen1.5-MoE-A2.7B": {
        **MODERN, "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768, "use_sliding_window": False,
    },
    "Qwen3-30B-A3B": {
        **MODERN, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False,
        "rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma-2b": {
        **MODERN, "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None,
    },
    "gemma-2-9b": {
        **MODERN, "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma-3-1b": {
        **{k: v for k, v in MODERN.items() if k != "hidden_act"}, "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    },
    "phi-2": {
        **LAYERNORM, "architectures": ["PhiForCausalLM"], "embd_pdrop": 0.0, "hidden_act": "gelu_new",
        "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
    },
    "Phi-3-mini-128k": {
        **MODERN, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "auto_map": {"a": "b"},
        "embd_pdrop": 0.0, "hidden_size": 3072, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
        "sliding_window": 262144,
    },
    "Phi-4-mini": {
        **MODERN, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0,
        "full_attn_mod": 1, "hidden_size": 3072, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "sliding_window": 262144, "tie_word_embeddings": True,
    },
    "OLMo-1B": {
        **{k: v for k, v in MODERN.items() if k != "rms_norm_eps"}, "architectures": ["OlmoForCausalLM"],
        "attention_bias": False, "clip_qkv": None, "rope_scaling": None,
    },
    "OLMo-2-1124-7B": {
        **MODERN, "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "rope_scaling": None,
    },
    "OLMoE-1B-7B": {
        **MODERN, "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None,
        "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "output_router_logits": False,
        "rope_scaling": None, "router_aux_loss_coef": 0.01,
    },
    "stablelm-2-1_6b": {
        **LAYERNORM, "architectures": ["StableLmForCausalLM"], "hidden_dropout": 0.0,
        "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_scaling": None,
        "use_parallel_residual": False, "use_qkv_bias": True,
    },
    "starcoder2-3b": {
        **{k: v for k, v in MODERN.items() if k not in ("rms_norm_eps", "tie_word_embeddings")},
        "architectures": ["Starcoder2ForCausalLM"], "activation_function": "gelu",
        "attention_softmax_in_fp32": True, "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-05, "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
        "residual_dropout": 0.1, "rope_theta": 999999.44, "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True,
    },
    "granite-3.0-2b": {
        **MODERN, "architectures": ["GraniteForCausalLM"], "attention_bias": False,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
        "mlp_bias": False,
        "residual_multiplier": 0.22, "rope_scaling": None,
    },
    "c4ai-command-r-v01": {
        **{k: v for k, v in LAYERNORM.items() if k != "tie_word_embeddings"},
        "architectures": ["CohereForCausalLM"], "attention_bias": False, "logit_scale": 0.0625,
        "model_max_length": 131072, "rope_theta": 8000000.0, "use_qk_norm": False,
    },
    "c4ai-command-r7b-12-2024": {
        **{k: v for k, v in LAYERNORM.items() if k != "tie_word_embeddings"},
        "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "cache_implementation": "hybrid",
        "layer_switch": 4, "logit_scale": 0.25, "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "rope_scaling": None, "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": False, "use_qk_norm": False,
    },
    "GLM-4-9B-0414": {
        **MODERN, "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "eos_token_id": [1, 2, 3],
        "head_dim": 128, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
    },
    "Mixtral-8x7B-v0.1": {
        **MODERN, "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2, "num_local_experts": 8,
        "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None,
    },
    "DeepSeek-V3 in bfloat16": {
        **MODERN, "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "auto_map": {"a": "b"},
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_key_value_heads": 16,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "topk_group": 4,
        "topk_method": "noaux_tc", "v_head_dim": 128,
    },
    "gpt-oss-20b in bfloat16": {
        **MODERN, "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4,
        "head_dim": 64, "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_experts_per_tok": 4,
        "num_local_experts": 32, "output_router_logits": False, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    },
}  # fmt: skip
# A few of the facts that such a config says in a way of its own.
FACTS: dict[str, dict[str, Any]] = {
    "gpt-neo-1.3B": {"windows": (None, 256, None, 256), "attention_scale": 1.0, "intermediate_size": 8192},
    "opt-350m": {"norm_place": "post", "final_norm": False, "embedding_size": 512},
    "starcoder": {"num_kv_heads": 1, "qkv_sizes": (6144, 128, 128)},
    "bloom-560m": {"max_position_embeddings": 2048, "tied_head": True},
    "falcon-7b": {"num_kv_heads": 1, "parallel": True, "shared_norm": True, "head_dim": 64},
    "Mistral-7B-v0.1": {"windows": (4096,) * 4},
    "Qwen2-0.5B": {"windows": (), "qkv_bias": True},
    "Qwen3-4B with yarn": {"max_position_embeddings": 131072},
    "gemma-2b": {"activation": "gelu_pytorch_tanh", "embedding_multiplier": 2048**0.5},
    "gemma-2-9b": {"windows": (4096, None) * 2, "score_cap": 50.0, "attention_scale": 1 / 16},
    "c4ai-command-r7b-12-2024": {"windows": (4096, 4096, 4096, None), "logit_multiplier": 0.25},
    "DeepSeek-V3 in bfloat16": {"num_kv_heads": 1, "head_dim": 576, "expert_layers": (3,)},
    "granite-3.0-2b": {"logit_multiplier": 0.125, "attention_scale": 0.015625},
}


def read(directory: Path, config: dict[str, Any]) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(config))
    return read_spec(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_understood(name: str, tmp_path: Path) -> None:
    spec = read(tmp_path, PUBLISHED[name])
    for field, value in FACTS.get(name, {}).items():
        assert getattr(spec, field) == value, field
    assert spec.kv_bytes_per_token(2) > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_field_that_nobody_knows_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_in_some_new_way is True"):
        read(tmp_path, {**PUBLISHED[name], "attention_in_some_new_way": True})


def test_longrope_of_phi3(tmp_path: Path) -> None:
    rope = read(tmp_path, PUBLISHED["Phi-3-mini-128k"]).positions
    assert isinstance(rope, RopePositions)
    assert (rope.scaling, rope.original_max_position_embeddings, rope.factor) == ("longrope", 4096, 32.0)
    assert rope.attention_factor == pytest.approx(1.19024, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("bloom-560m", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ("falcon-7b", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is False"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("mpt-7b", {"no_bias": False}, "no_bias is False"),
        ("mpt-7b", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln is True"),
        ("gpt-neo-1.3B", {"attention_layers": ["global"]}, "attention_layers must be 4 values"),
        ("gpt-j-6b", {"rotary_dim": 300}, "rotary_dim"),
        ("gemma-2-9b", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("gemma-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("phi-2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("Phi-3-mini-128k", {"sliding_window": "x"}, "sliding_window must be an integer"),
        (
            "Phi-3-mini-128k",
            {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0] * 48}},
            "long_factor has 1 values, 48 were expected",
        ),
        ("DeepSeek-V3 in bfloat16", {"quantization_config": {"fmt": "e4m3"}}, "quantization_config"),
        ("DeepSeek-V3 in bfloat16", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("gpt-oss-20b in bfloat16", {"swiglu_alpha": 2.0}, "swiglu_alpha"),
        (
            "gpt-oss-20b in bfloat16",
            {"quantization_config": {"quant_method": "awq"}},
            "quant_method is 'awq'",
        ),
        (
            "gpt-oss-20b in bfloat16",
            {"quantization_config": {"quant_method": "mxfp4"}, "intermediate_size": 2000},
            "intermediate_size",
        ),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_refused(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, {**PUBLISHED[name], **changes})


# What the native kernel computes; the others say what they need that it lacks.
NATIVE = {"Qwen2-0.5B"}
LACKING = {
    "gpt-j-6b": "parallel", "Mistral-7B-v0.1": "windows", "bloom-560m": "embedding_norm",
    "Qwen3-0.6B": "head_norm", "Mixtral-8x7B-v0.1": "experts", "granite-3.0-2b": "embedding_multiplier",
    "OLMo-1B": "weight=False", "mpt-7b": "bias=False", "Phi-3-mini-128k": "longrope",
    "starcoder2-3b": "windows", "DeepSeek-V3 in bfloat16": "experts",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NATIVE | LACKING.keys()))
def test_what_the_native_kernel_lacks(name: str, tmp_path: Path) -> None:
    from salver.model.kernels.program import unsupported

    reason = unsupported(read(tmp_path, PUBLISHED[name]))
    if name in NATIVE:
        assert reason is None
    else:
        assert reason is not None and reason.startswith("it does not do") and LACKING[name] in reason
