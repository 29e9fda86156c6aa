"""DeBERTa v2 and v3 (He et al. 2021): contents and distances apart, and a convolution in the largest."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import ConvolutionSpec, Disentangled, EncoderSpec, PositionTable
from ..spec import ACTIVATIONS, Copy, NormSpec, Source, Taps
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

_SELF = "attention.self"
_LAYER = LayerNames(
    "encoder.layer.{layer}",
    (f"{_SELF}.query_proj", f"{_SELF}.key_proj", f"{_SELF}.value_proj"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


@encoder_family(
    *("DebertaV2Model", "DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification"),
    *("DebertaV2ForTokenClassification", "DebertaV2ForQuestionAnswering"),
)
def deberta_v2(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=24, num_attention_heads=24,
        intermediate_size=6144, max_position_embeddings=512,
    )  # fmt: skip
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads:
        raise c.error("num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden})")
    c.only("attention_head_size", hidden // num_heads)
    norm, size = NormSpec("layer", c.number("layer_norm_eps", 1e-7)), c.size("embedding_size", hidden)
    kinds = c.words("pos_att_type")
    if not set(kinds) <= {"c2p", "p2c"}:
        raise c.error("pos_att_type", f"is {kinds}, which is not supported (supported: c2p, p2c)")
    disentangled, convolution = _disentangled(c, kinds, norm), _convolution(c)
    absolute, segments = c.boolean("position_biased_input", True), c.integer("type_vocab_size", 0)
    labels = c.labels()
    head = _head(c, task_of(architecture), hidden, size, norm, len(labels))
    tensors = embedding_tensors(segments=segments > 0, positions=absolute) | _LAYER.tensors(hidden)
    tensors |= _distance_tensors(disentangled)
    if size != hidden:
        tensors["embedding_projection.weight"] = Copy("embeddings.embed_proj.weight")
    if convolution is not None:
        tensors["convolution.taps.weight"] = Taps(Copy("encoder.conv.conv.weight"), convolution.kernel_size)
        tensors["convolution.taps.bias"] = Copy("encoder.conv.conv.bias")
        tensors |= pair("convolution_norm", "encoder.conv.LayerNorm")
    ignored = [r"(lm_predictions|mask_predictions)\..*"] if head is None or not head.spec.tied else []
    ignored += [r"mask_predictions\..*", *(() if absolute else (r"embeddings\.position_embeddings\..*",))]
    if disentangled is None:
        ignored += [r"encoder\.rel_embeddings\..*", r"encoder\.LayerNorm\..*"]
    elif disentangled.norm is None:
        ignored += [r"encoder\.LayerNorm\..*"]
    if head is None or not head.dense.startswith("pooler"):
        ignored += [r"pooler\..*"]
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=c.size("intermediate_size"),
        max_input_tokens=c.size("max_position_embeddings"),
        norm=norm,
        activation=c.choice("hidden_act", ACTIVATIONS, "gelu"),
        weights=weight_map(tensors, head, "deberta.", ignored=tuple(ignored)),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        embedding_size=size if size != hidden else None,
        embedding_projection=size != hidden,
        projection_first=True,
        num_segments=segments,
        positions=PositionTable() if absolute else None,
        disentangled=disentangled,
        convolution=convolution,
        # Every kind of score is counted in, also where relative_attention is off.
        attention_multiplier=(hidden // num_heads * (1 + len(set(kinds)))) ** -0.5,
        pad_token_id=c.token_id("pad_token_id"),
    )


def _disentangled(c: ConfigReader, kinds: tuple[str, ...], norm: NormSpec) -> Disentangled | None:
    relative, shared = c.boolean("relative_attention", False), c.boolean("share_att_key", False)
    buckets, furthest = (
        c.integer("position_buckets", -1, least=-1),
        c.integer("max_relative_positions", -1, least=-1),
    )
    norms = c.words("norm_rel_ebd")
    if not set(norms) <= {"none", "layer_norm"}:
        raise c.error("norm_rel_ebd", f"is {norms}, which is not supported (supported: none, layer_norm)")
    furthest = furthest if furthest > 0 else c.size("max_position_embeddings")
    if not relative or not kinds:
        return None
    if buckets > 0 and (buckets < 2 or furthest - 1 <= buckets // 2):
        raise c.error("position_buckets", f"({buckets}) must be from 2 to twice the {furthest} positions")
    return Disentangled(
        num_buckets=buckets if buckets > 0 else furthest,
        max_distance=furthest if buckets > 0 else 0,
        content_to_position="c2p" in kinds,
        position_to_content="p2c" in kinds,
        shared=shared,
        norm=norm if "layer_norm" in norms else None,
    )


def _distance_tensors(spec: Disentangled | None) -> dict[str, Source]:
    if spec is None:
        return {}
    found: dict[str, Source] = {"distances.weight": Copy("encoder.rel_embeddings.weight")}
    if spec.norm is not None:
        found |= pair("distances.norm", "encoder.LayerNorm")
    if not spec.shared and spec.content_to_position:
        found |= pair("layers.{layer}.distance.key", f"{_LAYER.prefix}.{_SELF}.pos_key_proj")
    if not spec.shared and spec.position_to_content:
        found |= pair("layers.{layer}.distance.query", f"{_LAYER.prefix}.{_SELF}.pos_query_proj")
    return found


def _convolution(c: ConfigReader) -> ConvolutionSpec | None:
    size = c.integer("conv_kernel_size", 0)
    activation = c.choice("conv_act", (*ACTIVATIONS, "tanh"), "tanh")
    c.only("conv_groups", 1)
    if size and size % 2 == 0:
        raise c.error("conv_kernel_size", f"must be odd, not {size}")
    return ConvolutionSpec(size, activation) if size else None


def _head(
    c: ConfigReader, task: str, hidden: int, size: int, norm: NormSpec, num_labels: int
) -> HeadNames | None:
    activation = c.choice("hidden_act", ACTIVATIONS, "gelu")
    legacy = c.boolean("legacy", True)
    c.only("pooler_hidden_size", hidden)
    pooled = c.choice("pooler_hidden_act", (*ACTIVATIONS, "tanh"), "gelu")
    c.ignore("pooler_dropout", "cls_dropout")
    if task == "MaskedLM" and legacy:
        names = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
        return vocabulary_head(
            c, c.size("vocab_size"), size, activation, norm,
            (*names, "cls.predictions.bias", "cls.predictions.decoder"),
        )  # fmt: skip
    if task == "MaskedLM":
        if size != hidden:
            raise c.error("embedding_size", f"({size}) must be hidden_size ({hidden}) unless legacy is true")
        name = "lm_predictions.lm_head"
        return vocabulary_head(
            c, c.size("vocab_size"), hidden, activation, norm,
            (f"{name}.dense", f"{name}.LayerNorm", f"{name}.bias", f"{name}.decoder"),
        )  # fmt: skip
    if task == "SequenceClassification":
        return label_head(
            "input", num_labels, "classifier", dense="pooler.dense", dense_size=hidden, activation=pooled
        )
    return plain_head(task, num_labels)
