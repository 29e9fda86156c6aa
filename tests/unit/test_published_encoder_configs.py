"""The config.json of published encoders, and decoders that classify or embed, as their makers wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salver.model.encoder_config import read_any_spec
from salver.model.encoder_spec import ConvolutionSpec, EncoderSpec
from salver.model.spec import ModelSpec, RopePositions

DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
    "position_biased_input": False, "type_vocab_size": 0, "vocab_size": 128100, "pad_token_id": 0,
    "pooler_dropout": 0, "pooler_hidden_act": "gelu", "torch_dtype": "float32",
    "transformers_version": "4.17.0",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "deberta-v3-base": {
        **DEBERTA, "architectures": ["DebertaV2ForTokenClassification"], "hidden_size": 768,
        "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pooler_hidden_size": 768,
    },
    "deberta-v2-xlarge-mnli": {
        **DEBERTA, "architectures": ["DebertaV2ForSequenceClassification"], "hidden_size": 1536,
        "intermediate_size": 6144, "num_attention_heads": 24, "attention_head_size": 64,
        "num_hidden_layers": 24, "conv_kernel_size": 3, "conv_act": "gelu", "pooler_hidden_size": 1536,
        "id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"},
        "label2id": {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    },
    "nomic-embed-text-v1.5": {
        "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
        "auto_map": {"AutoConfig": "x--configuration_hf_nomic_bert.NomicBertConfig"}, "bos_token_id": None,
        "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None,
        "fused_bias_fc": True, "fused_dropout_add_ln": True, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False,
        "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": 768, "n_head": 12, "n_inner": 3072,
        "n_layer": 12, "n_positions": 8192, "pad_vocab_size_multiple": 64, "parallel_block": False,
        "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False,
        "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
        "summary_activation": None, "summary_first_dropout": 0.0, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "torch_dtype": "float32",
        "transformers_version": "4.37.2", "type_vocab_size": 2, "use_cache": True, "use_flash_attn": True,
        "use_rms_norm": False, "use_xentropy": True, "vocab_size": 30528,
    },
    "a reward model of Llama 3.1": {
        "architectures": ["LlamaForSequenceClassification"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02, "intermediate_size": 14336, "label2id": {"LABEL_0": 0},
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pad_token_id": 128256, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2", "use_cache": True, "vocab_size": 128257,
    },
    "e5-mistral-7b-instruct": {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["MistralModel"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 2,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.34.0", "use_cache": False, "vocab_size": 32000,
    },
}  # fmt: skip


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, EncoderSpec | ModelSpec]:
    found = {}
    for name, config in PUBLISHED.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        found[name] = read_any_spec(tmp_path)
    return found


def test_they_are_understood(specs: dict[str, Any]) -> None:
    deberta, large = specs["deberta-v3-base"], specs["deberta-v2-xlarge-mnli"]
    assert deberta.disentangled.num_buckets == 256 and deberta.disentangled.max_distance == 512
    assert deberta.disentangled.shared and deberta.disentangled.kinds == 2 and deberta.positions is None
    assert deberta.convolution is None and deberta.head.reads == "tokens"
    assert large.convolution == ConvolutionSpec(3, "gelu") and large.labels[2] == "ENTAILMENT"
    assert large.head_dim == 64 and large.attention_scale == pytest.approx(192**-0.5)
    nomic = specs["nomic-embed-text-v1.5"]
    assert nomic.rope == RopePositions(1000.0) and nomic.max_input_tokens == 8192
    assert nomic.activation == "silu" and nomic.vocab_size == 30528 and nomic.norm.eps == 1e-12
    reward = specs["a reward model of Llama 3.1"]
    assert reward.classifier.labels == ("LABEL_0",) and reward.classifier.padding_id == 128256
    assert reward.classifier.place([5, 6, 128256, 128256]) == 1 and reward.body
    mistral = specs["e5-mistral-7b-instruct"]
    assert mistral.body and mistral.classifier is None and mistral.windows == (4096,) * 32
