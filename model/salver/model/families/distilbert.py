"""DistilBERT (Sanh et al. 2019): BERT with half the layers and no segments."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, HeadSpec, PositionTable
from ..spec import ACTIVATIONS, NormSpec
from . import encoder_family
from .bert import plain_head
from .encoder_names import (
    HeadNames,
    LayerNames,
    embedding_tensors,
    problem_type,
    task_of,
    vocabulary_head,
    weight_map,
)

_LAYER = LayerNames(
    "transformer.layer.{layer}",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)


@encoder_family(
    *("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    *("DistilBertForTokenClassification", "DistilBertForQuestionAnswering"),
)
def distilbert(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(vocab_size=30522, dim=768, n_layers=6, n_heads=12, hidden_dim=3072, max_position_embeddings=512)
    hidden, num_heads, norm = c.size("dim"), c.size("n_heads"), NormSpec("layer", 1e-12)
    if hidden % num_heads:
        raise c.error("n_heads", f"({num_heads}) must divide dim ({hidden})")
    activation = c.choice("activation", ACTIVATIONS, "gelu")
    task, labels = task_of(architecture), c.labels()
    if task == "MaskedLM":
        names = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector")
        head: HeadNames | None = vocabulary_head(c, c.size("vocab_size"), hidden, activation, norm, names)
    elif task == "SequenceClassification":
        spec = HeadSpec("input", len(labels), dense_size=hidden, activation="relu")
        head = HeadNames(spec, dense="pre_classifier", out="classifier")
    else:
        head = plain_head(task, len(labels))
    c.only("sinusoidal_pos_embds", False, True)  # either way the table is in the checkpoint
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=c.size("n_layers"),
        num_heads=num_heads,
        intermediate_size=c.size("hidden_dim"),
        max_input_tokens=c.size("max_position_embeddings"),
        norm=norm,
        activation=activation,
        weights=weight_map(embedding_tensors(segments=False) | _LAYER.tensors(hidden), head, "distilbert."),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        positions=PositionTable(),
        pad_token_id=c.token_id("pad_token_id"),
    )
