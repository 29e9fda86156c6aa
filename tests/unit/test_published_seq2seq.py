"""The config.json of published encoder-decoders is understood: every field that stands in one.

As the models' makers wrote them, with fewer layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salver.model.config_reader import read_spec
from salver.model.errors import CheckpointError
from salver.model.generation_config import GenerationConfig
from salver.model.spec import ModelSpec

OLD_BART: dict[str, Any] = {
    "_num_labels": 3, "activation_dropout": 0.0, "add_bias_logits": False, "attention_dropout": 0.0,
    "classif_dropout": 0.0, "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048,
    "decoder_layerdrop": 0.0, "decoder_layers": 2, "dropout": 0.1, "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "encoder_layers": 2, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "init_std": 0.02, "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_hidden_layers": 2, "use_cache": True,
    "transformers_version": "4.22.0", "torch_dtype": "float32",
}  # fmt: skip
T5: dict[str, Any] = {
    "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
    "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "num_heads": 8, "num_layers": 2, "output_past": True, "pad_token_id": 0, "use_cache": True,
    "relative_attention_num_buckets": 32, "vocab_size": 32128,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "opus-mt-en-de": {
        **OLD_BART, "architectures": ["MarianMTModel"], "activation_function": "swish",
        "add_final_layer_norm": False, "bad_words_ids": [[58100]], "bos_token_id": 0,
        "classifier_dropout": 0.0, "decoder_start_token_id": 58100, "decoder_vocab_size": 58101,
        "eos_token_id": 0, "extra_pos_embeddings": 58101, "force_bos_token_to_be_generated": False,
        "forced_eos_token_id": 0, "max_length": 512, "max_position_embeddings": 512, "model_type": "marian",
        "normalize_before": False, "normalize_embedding": False, "num_beams": 4, "pad_token_id": 58100,
        "scale_embedding": True, "share_encoder_decoder_embeddings": True, "static_position_embeddings": True,
        "vocab_size": 58101,
    },
    "bart-large-cnn": {
        **OLD_BART, "architectures": ["BartForConditionalGeneration"], "activation_function": "gelu",
        "add_final_layer_norm": False, "bos_token_id": 0, "classifier_dropout": 0.0,
        "decoder_start_token_id": 2, "early_stopping": True, "eos_token_id": 2, "forced_bos_token_id": 0,
        "forced_eos_token_id": 2, "length_penalty": 2.0, "max_length": 142, "max_position_embeddings": 1024,
        "min_length": 56, "model_type": "bart", "no_repeat_ngram_size": 3, "normalize_before": False,
        "num_beams": 4, "output_past": True, "pad_token_id": 1, "prefix": " ", "scale_embedding": False,
        "task_specific_params": {"summarization": {"num_beams": 4}}, "vocab_size": 50264,
    },
    "mbart-large-50-many-to-many-mmt": {
        **OLD_BART, "architectures": ["MBartForConditionalGeneration"], "activation_function": "relu",
        "add_final_layer_norm": True, "bos_token_id": 0, "classifier_dropout": 0.0,
        "decoder_start_token_id": 2, "early_stopping": True, "eos_token_id": 2, "forced_eos_token_id": 2,
        "max_length": 200, "max_position_embeddings": 1024, "model_type": "mbart", "normalize_before": True,
        "normalize_embedding": True, "num_beams": 5, "output_past": True, "pad_token_id": 1,
        "scale_embedding": True, "static_position_embeddings": False, "tokenizer_class": "MBart50Tokenizer",
        "vocab_size": 250054,
    },
    "nllb-200-distilled-600M": {
        **OLD_BART, "architectures": ["M2M100ForConditionalGeneration"], "activation_function": "relu",
        "bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "max_length": 200,
        "max_position_embeddings": 1024, "model_type": "m2m_100", "pad_token_id": 1, "scale_embedding": True,
        "tokenizer_class": "NllbTokenizer", "vocab_size": 256206,
    },
    "pegasus-xsum": {
        **OLD_BART, "architectures": ["PegasusForConditionalGeneration"], "activation_function": "relu",
        "add_final_layer_norm": True, "bos_token_id": 0, "eos_token_id": 1, "extra_pos_embeddings": 0,
        "force_bos_token_to_be_generated": False, "forced_eos_token_id": 1, "length_penalty": 0.6,
        "max_length": 64, "max_position_embeddings": 512, "model_type": "pegasus", "normalize_before": True,
        "normalize_embedding": False, "num_beams": 8, "pad_token_id": 0, "scale_embedding": True,
        "static_position_embeddings": True, "vocab_size": 96103, "decoder_start_token_id": 0,
    },
    "blenderbot-400M-distill": {
        **OLD_BART, "architectures": ["BlenderbotForConditionalGeneration"], "activation_function": "gelu",
        "add_final_layer_norm": True, "bos_token_id": 1, "decoder_start_token_id": 1,
        "do_blenderbot_90_layernorm": True, "encoder_no_repeat_ngram_size": 3, "eos_token_id": 2,
        "extra_pos_embeddings": 0, "forced_eos_token_id": 2, "layernorm_variant": "prelayernorm",
        "length_penalty": 0.65, "max_length": 60, "max_position_embeddings": 128, "min_length": 20,
        "model_type": "blenderbot", "normalize_before": True, "normalize_embedding": False, "num_beams": 10,
        "pad_token_id": 0, "scale_embedding": True, "static_position_embeddings": False,
        "unk_token_id": 3, "vocab_size": 8008,
    },
    "t5-small": {
        **T5, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512,
        "task_specific_params": {"translation_en_to_de": {"prefix": "translate English to German: "}},
    },
    "t5-3b": {**T5, "architectures": ["T5WithLMHeadModel"], "model_type": "t5", "d_kv": 128},
    "flan-t5-small": {
        **T5, "architectures": ["T5ForConditionalGeneration"], "d_ff": 1024,
        "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "num_heads": 6,
        "relative_attention_max_distance": 128, "model_type": "t5",
        "tie_word_embeddings": False, "dense_act_fn": "gelu_new", "is_gated_act": True, "n_positions": 512,
        "transformers_version": "4.23.1",
    },
    "mt5-small": {
        **T5, "architectures": ["MT5ForConditionalGeneration"], "d_ff": 1024, "model_type": "mt5",
        "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "num_heads": 6,
        "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "vocab_size": 250112,
    },
    "umt5-small": {
        **T5, "architectures": ["UMT5ForConditionalGeneration"], "d_ff": 1024, "model_type": "umt5",
        "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
        "classifier_dropout": 0.0, "scalable_attention": True, "num_decoder_layers": 2, "num_heads": 6,
        "relative_attention_max_distance": 128, "tie_word_embeddings": False,
        "tokenizer_class": "T5Tokenizer", "vocab_size": 256384,
    },
}  # fmt: skip


def read(directory: Path, config: dict[str, Any]) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(config))
    return read_spec(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_is_understood(name: str, tmp_path: Path) -> None:
    spec = read(tmp_path, PUBLISHED[name])
    assert spec.encoder is not None and spec.encoder.num_layers == spec.num_layers == 2


def test_what_they_begin_and_end_with(tmp_path: Path) -> None:
    spec = read(tmp_path, PUBLISHED["bart-large-cnn"])
    assert (spec.output_start, spec.forced_eos_token_id) == ((2, 0), 2)
    says = GenerationConfig.from_directory(tmp_path, output_start=2)
    assert (says.max_tokens, says.min_tokens, says.no_repeat_ngram_size) == (140, 54, 3)
    assert says.temperature == 0.0 and says.num_beams == 4 and says.ignored == ()
    # transformers 4.25 and later write the file, and then only that counts.
    generation = {"decoder_start_token_id": 5, "forced_bos_token_id": 7, "max_length": 30, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = read_spec(tmp_path)
    assert (spec.output_start, spec.forced_eos_token_id) == ((5, 7), None)
    says = GenerationConfig.from_directory(tmp_path, output_start=2)
    assert (says.max_tokens, says.min_tokens, says.temperature) == (28, None, None)


def test_t5_scales_where_its_head_is_tied(tmp_path: Path) -> None:
    assert read(tmp_path, PUBLISHED["t5-small"]).logit_multiplier == 512**-0.5
    flan = read(tmp_path, PUBLISHED["flan-t5-small"])
    assert (flan.logit_multiplier, flan.tied_head, flan.activation, flan.gated) == (
        1,
        False,
        "gelu_new",
        True,
    )


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("opus-mt-en-de", "normalize_before", True),
        ("opus-mt-en-de", "static_position_embeddings", False),
        ("opus-mt-en-de", "decoder_vocab_size", 7),
        ("opus-mt-en-de", "activation_function", "mish"),
        ("bart-large-cnn", "add_bias_logits", True),
        ("bart-large-cnn", "d_model", 510),
        ("bart-large-cnn", "tie_word_embeddings", False),
        ("blenderbot-400M-distill", "layernorm_variant", "xlm"),
        ("t5-small", "feed_forward_proj", "gated-mish"),
        ("t5-small", "is_decoder", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    message = "attention_heads" if field == "d_model" else field
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, {**PUBLISHED[name], field: value})
