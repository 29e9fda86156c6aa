"""MPNet (Song et al. 2020): RoBERTa's embeddings, and T5's relative buckets shared by all layers."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, PositionTable, RelativeBuckets
from ..spec import ACTIVATIONS, Copy, NormSpec, Source
from . import encoder_family
from .bert import plain_head, two_layer_head
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
    "encoder.layer.{layer}",
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "attention.attn.o",
    "attention.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_PADDING = 1  # whatever pad_token_id says: the reference counts positions from it


@encoder_family(
    *("MPNetModel", "MPNetForMaskedLM", "MPNetForSequenceClassification"),
    *("MPNetForTokenClassification", "MPNetForQuestionAnswering"),
)
def mpnet(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(
        vocab_size=30527, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512,
    )  # fmt: skip
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads:
        raise c.error("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden})")
    norm = NormSpec("layer", c.number("layer_norm_eps", 1e-12))
    task, labels = task_of(architecture), c.labels()
    if task == "MaskedLM":
        names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder")
        head: HeadNames | None = vocabulary_head(c, c.size("vocab_size"), hidden, "gelu", norm, names)
    elif task == "SequenceClassification":
        head = two_layer_head(len(labels), hidden, "tanh")
    else:
        head = plain_head(task, len(labels))
    buckets: Source = Copy("encoder.relative_attention_bias.weight")
    tensors = embedding_tensors(segments=False) | _LAYER.tensors(hidden) | {"buckets.weight": buckets}
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=c.size("intermediate_size"),
        max_input_tokens=c.size("max_position_embeddings") - _PADDING - 1,
        norm=norm,
        activation=c.choice("hidden_act", ACTIVATIONS, "gelu"),
        weights=weight_map(tensors, head, "mpnet.", ignored=(r"pooler\..*",)),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        positions=PositionTable(_PADDING + 1, _PADDING),
        # The reference takes the number of buckets for the table's size only: it always counts 32.
        buckets=RelativeBuckets(c.size("relative_attention_num_buckets", 32), 128),
        pad_token_id=c.token_id("pad_token_id"),
    )
