"""What the encoder families share: how tensors are named, which heads there are, what configs say of both."""

from __future__ import annotations

from dataclasses import dataclass

from ..config_reader import ConfigReader
from ..encoder_spec import HeadSpec
from ..spec import Cat, Copy, NormSpec, Source, WeightMap

# Before 2019 they were called so (TensorFlow's names), and some checkpoints still are.
OLD_NAMES = ((r"\.gamma", ".weight"), (r"\.beta", ".bias"))
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class LayerNames:
    """A layer's names in the checkpoint, with `{layer}` in `prefix`."""

    prefix: str
    query_key_value: tuple[str, str, str]
    attention_out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str

    def tensors(self, hidden_size: int) -> dict[str, Source]:
        """All with biases."""
        found: dict[str, Source] = {}
        for kind in ("weight", "bias"):
            parts = tuple(Copy(f"{self.prefix}.{name}.{kind}") for name in self.query_key_value)
            found[f"layers.{{layer}}.qkv.{kind}"] = Cat(parts, (hidden_size,) * 3)
            for ours in ("attention_out", "attention_norm", "up", "down", "mlp_norm"):
                found[f"layers.{{layer}}.{ours}.{kind}"] = Copy(f"{self.prefix}.{getattr(self, ours)}.{kind}")
        return found


BERT_LAYER = LayerNames(
    "encoder.layer.{layer}",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


def pair(ours: str, theirs: str) -> dict[str, Source]:
    """A weight and its bias."""
    return {f"{ours}.{kind}": Copy(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def embedding_tensors(*, segments: bool, positions: bool = True) -> dict[str, Source]:
    """The tables and their norm under BERT's names."""
    found: dict[str, Source] = {"embed.weight": Copy(WORDS)}
    if positions:
        found["positions.weight"] = Copy("embeddings.position_embeddings.weight")
    if segments:
        found["segments.weight"] = Copy("embeddings.token_type_embeddings.weight")
    return found | pair("embedding_norm", "embeddings.LayerNorm")


@dataclass(frozen=True, slots=True)
class HeadNames:
    """The head of an architecture: what it is, and its names in the checkpoint.

    `ignored` are tensors of other heads that such a checkpoint may hold too; `bias` is a tied head's.
    """

    spec: HeadSpec
    dense: str = ""
    norm: str = ""
    out: str = ""
    bias: str = ""
    copies: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for ours, bias in (("dense", self.spec.dense_bias), ("norm", True), ("out", self.spec.out_bias)):
            if theirs := getattr(self, ours):
                both = pair(f"head.{ours}", theirs)
                found |= both if bias else {f"head.{ours}.weight": Copy(f"{theirs}.weight")}
        if self.bias:
            found["head.bias.weight"] = Copy(self.bias)
        return found


def vocabulary_head(
    c: ConfigReader,
    vocab_size: int,
    width: int,
    activation: str,
    norm: NormSpec,
    names: tuple[str, str, str, str],
) -> HeadNames:
    """A masked language model's head, tied to the embeddings: `names` of dense, norm, bias, output."""
    c.only("tie_word_embeddings", True)
    dense, norm_name, bias, out = names
    return HeadNames(
        HeadSpec("vocabulary", vocab_size, dense_size=width, activation=activation, norm=norm, tied=True),
        dense=dense,
        norm=norm_name,
        bias=bias,
        copies=((f"{out}.weight", WORDS), (f"{out}.bias", bias)),
    )


def label_head(reads: str, num_labels: int, out: str, **dense: object) -> HeadNames:
    """A classifier: `dense` are `dense_size`, `activation` and the names `dense`."""
    name = str(dense.pop("dense", ""))
    return HeadNames(HeadSpec(reads, num_labels, **dense), dense=name, out=out)  # type: ignore[arg-type]


def task_of(architecture: str) -> str:
    """What follows "For" in the name: SequenceClassification, MaskedLM ...; "" for a body."""
    return architecture.partition("For")[2]


def weight_map(
    tensors: dict[str, Source], head: HeadNames | None, prefix: str, *, ignored: tuple[str, ...] = ()
) -> WeightMap:
    """The map of a body and its head; a body alone may have been saved with heads, which nobody reads."""
    heads = r"(pooler|cls|lm_head|classifier|qa_outputs|predictions|pre_classifier|vocab_\w+|generator_\w+|"
    heads += r"discriminator_\w+|lm_predictions|seq_relationship|sop_classifier|head|decoder)\..*"
    return WeightMap(
        tensors | (head.tensors() if head else {}),
        ignored=(
            r"embeddings\.(position_ids|token_type_ids)",
            *ignored,
            *((heads,) if head is None else head.ignored),
        ),
        duplicates=head.copies if head else (),
        optional_prefix=prefix,
        renames=OLD_NAMES,
    )


def problem_type(c: ConfigReader) -> str:
    """As config.json says; "" where it says nothing."""
    return c.choice("problem_type", ("", *PROBLEM_TYPES), "")
