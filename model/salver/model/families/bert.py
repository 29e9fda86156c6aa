"""BERT (Devlin et al. 2018) and those that share its blocks: RoBERTa, XLM-R, ELECTRA."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, HeadSpec, PositionTable
from ..spec import ACTIVATIONS, NormSpec
from . import encoder_family
from .encoder_names import (
    BERT_LAYER,
    HeadNames,
    embedding_tensors,
    label_head,
    pair,
    problem_type,
    task_of,
    vocabulary_head,
    weight_map,
)

_BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "max_position_embeddings": 512,
}  # fmt: skip
# What a body with another head may carry along: the pooler, the pretraining's second head.
_EXTRAS = (r"pooler\..*", r"cls\.seq_relationship\..*")


@encoder_family(
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    *("BertForTokenClassification", "BertForQuestionAnswering"),
)
def bert(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(vocab_size=30522, **_BASE)
    hidden, norm = c.size("hidden_size"), NormSpec("layer", c.number("layer_norm_eps", 1e-12))
    task, labels = task_of(architecture), c.labels()
    head: HeadNames | None = None
    if task in ("MaskedLM", "PreTraining"):
        names = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
        activation = c.choice("hidden_act", ACTIVATIONS, "gelu")
        head = vocabulary_head(
            c, c.size("vocab_size"), hidden, activation, norm,
            (*names, "cls.predictions.bias", "cls.predictions.decoder"),
        )  # fmt: skip
    elif task == "SequenceClassification":
        head = label_head("input", len(labels), "classifier", dense="pooler.dense", dense_size=hidden)
    else:
        head = plain_head(task, len(labels))
    return bert_spec(c, architecture, "bert.", head, norm, labels, extras=_EXTRAS)


def plain_head(task: str, num_labels: int) -> HeadNames | None:
    """The heads that are one matrix in every family; None for a body."""
    if task == "TokenClassification":
        return label_head("tokens", num_labels, "classifier")
    if task == "QuestionAnswering":
        return label_head("spans", 2, "qa_outputs")
    return None


def bert_spec(
    c: ConfigReader,
    architecture: str,
    prefix: str,
    head: HeadNames | None,
    norm: NormSpec,
    labels: tuple[str, ...],
    *,
    positions: PositionTable = PositionTable(),  # noqa: B008 - it is frozen
    embedding_size: int | None = None,
    extras: tuple[str, ...] = (r"pooler\..*",),
) -> EncoderSpec:
    """The common shape: learned positions and segments, post-norm blocks, biases everywhere."""
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads:
        raise c.error("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden})")
    c.only("position_embedding_type", "absolute")
    c.only("is_decoder", False)
    c.only("add_cross_attention", False)
    c.only("pruned_heads", {})
    segments = c.integer("type_vocab_size", 2)
    projected = embedding_size is not None and embedding_size != hidden
    tensors = embedding_tensors(segments=segments > 0) | BERT_LAYER.tensors(hidden)
    if projected:
        tensors |= pair("embedding_projection", "embeddings_project")
    own = {r"pooler\..*"} if head is not None and head.dense.startswith("pooler") else set[str]()
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=c.size("intermediate_size"),
        max_input_tokens=c.size("max_position_embeddings") - positions.offset,
        norm=norm,
        activation=c.choice("hidden_act", ACTIVATIONS, "gelu"),
        weights=weight_map(tensors, head, prefix, ignored=tuple(e for e in extras if e not in own)),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        embedding_size=embedding_size if projected else None,
        embedding_projection=projected,
        num_segments=segments,
        positions=positions,
        pad_token_id=c.token_id("pad_token_id"),
    )


# ---- RoBERTa (Liu et al. 2019), XLM-R (Conneau et al. 2019), CamemBERT ----


def _heads_of(family: str) -> tuple[str, ...]:
    tasks = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    return (f"{family}Model", *(f"{family}For{task}" for task in tasks))


@encoder_family(*_heads_of("Roberta"), *_heads_of("XLMRoberta"), *_heads_of("Camembert"))
def roberta(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(vocab_size=50265 if architecture.startswith("Roberta") else 30522, **_BASE)
    hidden, norm = c.size("hidden_size"), NormSpec("layer", c.number("layer_norm_eps", 1e-12))
    task, labels = task_of(architecture), c.labels()
    if task == "MaskedLM":
        names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder")
        head: HeadNames | None = vocabulary_head(c, c.size("vocab_size"), hidden, "gelu", norm, names)
    elif task == "SequenceClassification":
        head = two_layer_head(len(labels), hidden, "tanh")
    else:
        head = plain_head(task, len(labels))
    pad = c.integer("pad_token_id", 1)
    table = PositionTable(pad + 1, pad)
    extras = (r"pooler\..*", r"lm_head\..*") if task != "MaskedLM" else (r"pooler\..*",)
    return bert_spec(c, architecture, "roberta.", head, norm, labels, positions=table, extras=extras)


def two_layer_head(num_labels: int, hidden: int, activation: str) -> HeadNames:
    """classifier.dense, activation, classifier.out_proj, of the first token."""
    spec = HeadSpec("input", num_labels, dense_size=hidden, activation=activation)
    return HeadNames(spec, dense="classifier.dense", out="classifier.out_proj")


# ---- ELECTRA (Clark et al. 2020) ----


@encoder_family(*_heads_of("Electra"))
def electra(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(
        vocab_size=30522, hidden_size=256, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=512,
    )  # fmt: skip
    hidden, norm = c.size("hidden_size"), NormSpec("layer", c.number("layer_norm_eps", 1e-12))
    size = c.size("embedding_size", 128)
    task, labels = task_of(architecture), c.labels()
    if task == "MaskedLM":
        names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
        head: HeadNames | None = vocabulary_head(
            c, c.size("vocab_size"), size, "gelu", norm, (*names, "generator_lm_head")
        )
    elif task == "SequenceClassification":
        head = two_layer_head(len(labels), hidden, "gelu")
    else:
        head = plain_head(task, len(labels))
    extras = (r"discriminator_predictions\..*",)
    return bert_spec(c, architecture, "electra.", head, norm, labels, embedding_size=size, extras=extras)
