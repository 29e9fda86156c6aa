"""ALBERT (Lan et al. 2019): narrow embeddings, and layers that share their weights."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, PositionTable
from ..spec import ACTIVATIONS, NormSpec
from . import encoder_family
from .bert import plain_head
from .encoder_names import (
    HeadNames,
    LayerNames,
    embedding_tensors,
    label_head,
    pair,
    problem_type,
    task_of,
    vocabulary_head,
    weight_map,
)

_LAYER = LayerNames(
    "encoder.albert_layer_groups.{layer}.albert_layers.0",
    ("attention.query", "attention.key", "attention.value"),
    "attention.dense",
    "attention.LayerNorm",
    "ffn",
    "ffn_output",
    "full_layer_layer_norm",
)


@encoder_family(
    *("AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining", "AlbertForSequenceClassification"),
    *("AlbertForTokenClassification", "AlbertForQuestionAnswering"),
)
def albert(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(
        vocab_size=30000, hidden_size=4096, num_hidden_layers=12, num_attention_heads=64,
        intermediate_size=16384, max_position_embeddings=512,
    )  # fmt: skip
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads:
        raise c.error("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden})")
    norm, size = NormSpec("layer", c.number("layer_norm_eps", 1e-12)), c.size("embedding_size", 128)
    activation = c.choice("hidden_act", ACTIVATIONS, "gelu_new")
    num_layers, groups = c.size("num_hidden_layers"), c.size("num_hidden_groups", 1)
    c.only("inner_group_num", 1)
    c.only("position_embedding_type", "absolute")
    c.only("is_decoder", False)
    task, labels = task_of(architecture), c.labels()
    own_pooler = task == "SequenceClassification"
    if task in ("MaskedLM", "PreTraining"):
        names = ("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder")
        head: HeadNames | None = vocabulary_head(c, c.size("vocab_size"), size, activation, norm, names)
    elif own_pooler:
        head = label_head("input", len(labels), "classifier", dense="pooler", dense_size=hidden)
    else:
        head = plain_head(task, len(labels))
    tensors = embedding_tensors(segments=True) | _LAYER.tensors(hidden)
    tensors |= pair("embedding_projection", "encoder.embedding_hidden_mapping_in")
    extras = (r"sop_classifier\..*",) if own_pooler else (r"pooler\..*", r"sop_classifier\..*")
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=groups,
        num_heads=num_heads,
        intermediate_size=c.size("intermediate_size"),
        max_input_tokens=c.size("max_position_embeddings"),
        norm=norm,
        activation=activation,
        weights=weight_map(tensors, head, "albert.", ignored=extras),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        embedding_size=size,
        embedding_projection=True,
        num_segments=c.size("type_vocab_size", 2),
        positions=PositionTable(),
        layer_order=tuple(int(i / (num_layers / groups)) for i in range(num_layers)),
        pad_token_id=c.token_id("pad_token_id"),
    )
