"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, gated MLPs, windows in most layers."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, HeadSpec
from ..spec import ACTIVATIONS, Copy, NormSpec, Optional, RopePositions, Source, WeightMap
from . import encoder_family
from .encoder_names import problem_type, task_of

_EMBED = "embeddings.tok_embeddings.weight"
_KINDS = ("full_attention", "sliding_attention")


@encoder_family(
    *("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
    *("ModernBertForTokenClassification", "ModernBertForQuestionAnswering"),
)
def modernbert(c: ConfigReader, architecture: str) -> EncoderSpec:
    c.suppose(
        vocab_size=50368, hidden_size=768, num_hidden_layers=22, num_attention_heads=12,
        intermediate_size=1152, max_position_embeddings=8192,
    )  # fmt: skip
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads or hidden // num_heads % 2:
        raise c.error("num_attention_heads", f"({num_heads}) must cut hidden_size ({hidden}) into even parts")
    norm, inner = NormSpec("layer", c.number("norm_eps", 1e-5)), c.size("intermediate_size")
    attention_bias, mlp_bias = c.boolean("attention_bias", False), c.boolean("mlp_bias", False)
    norm_bias, labels = c.boolean("norm_bias", False), c.labels()
    num_layers = c.size("num_hidden_layers")
    kinds, sight = _layer_kinds(c, num_layers), c.size("local_attention", 128) // 2
    head = _head(c, task_of(architecture), hidden, norm, len(labels))
    rope, local_rope = _ropes(c)
    c.only("layer_norm_eps", norm.eps)
    c.only("position_embedding_type", "absolute", "sans_pos")  # old configurations say so; nothing reads it
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=inner,
        max_input_tokens=c.size("max_position_embeddings"),
        norm=norm,
        activation=c.choice("hidden_activation", ACTIVATIONS, "gelu"),
        weights=_weights(hidden, norm_bias, attention_bias, mlp_bias, num_layers, head),
        head=head,
        labels=labels,
        problem_type=problem_type(c),
        rope=rope,
        local_rope=local_rope,
        windows=tuple(0 if kind == "full_attention" else sight for kind in kinds),
        pre_norm=True,
        first_norm=False,
        final_norm=True,
        gated=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=mlp_bias,
        pad_token_id=c.token_id("pad_token_id"),
    )


def _layer_kinds(c: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """`layer_types`, or every so many layers a global one."""
    every = c.size("global_attn_every_n_layers", 3)
    kinds = c.strings("layer_types") or tuple(_KINDS[i % every > 0] for i in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise c.error("layer_types", f"must be {num_layers} of {', '.join(_KINDS)}")
    return kinds


def _ropes(c: ConfigReader) -> tuple[RopePositions, RopePositions]:
    """Of global and of local layers: `rope_parameters`, or the two thetas of earlier configurations."""
    thetas = [c.number("global_rope_theta", 160000.0), c.number("local_rope_theta", 10000.0)]
    parameters = c.section("rope_parameters")
    for i, kind in enumerate(_KINDS):
        section = parameters.section(kind) if parameters is not None else None
        if section is not None:
            section.only("rope_type", "default")
            thetas[i] = section.number("rope_theta", thetas[i])
            section.refuse_unread()
    if parameters is not None:
        parameters.refuse_unread()
    return RopePositions(thetas[0]), RopePositions(thetas[1])


def _head(c: ConfigReader, task: str, hidden: int, norm: NormSpec, num_labels: int) -> HeadSpec | None:
    activation = c.choice("classifier_activation", ACTIVATIONS, "gelu")
    bias, decoder_bias = c.boolean("classifier_bias", False), c.boolean("decoder_bias", True)
    pooling = c.choice("classifier_pooling", ("cls", "mean"), "cls")
    c.only("tie_word_embeddings", True)
    reads = {
        "MaskedLM": "vocabulary",
        "SequenceClassification": "input",
        "TokenClassification": "tokens",
        "QuestionAnswering": "spans",
    }.get(task)
    if reads is None:
        return None
    size = {"vocabulary": c.size("vocab_size"), "spans": 2}.get(reads, num_labels)
    return HeadSpec(
        reads,
        size,
        pooling=pooling,
        dense_size=hidden,
        dense_bias=bias,
        activation=activation,
        norm=norm,
        out_bias=decoder_bias if reads == "vocabulary" else True,
        tied=reads == "vocabulary",
    )


def _weights(
    hidden: int, norm_bias: bool, attention_bias: bool, mlp_bias: bool, num_layers: int, head: HeadSpec | None
) -> WeightMap:
    tensors: dict[str, Source] = {"embed.weight": Copy(_EMBED)}

    def norm(ours: str, theirs: str) -> None:
        tensors[f"{ours}.weight"] = Copy(f"{theirs}.weight")
        bias = Copy(f"{theirs}.bias")
        # Without one it is a bias of zeros.
        tensors[f"{ours}.bias"] = bias if norm_bias else Optional(bias, (hidden,))

    norm("embedding_norm", "embeddings.norm")
    norm("final_norm", "final_norm")
    norm("layers.{layer}.mlp_norm", "layers.{layer}.mlp_norm")
    for layer in range(1, num_layers):  # the first one's attention has none: the embeddings' came just before
        norm(f"layers.{layer}.attention_norm", f"layers.{layer}.attn_norm")
    products = {"qkv": "attn.Wqkv", "attention_out": "attn.Wo", "up": "mlp.Wi", "down": "mlp.Wo"}
    for ours, theirs in products.items():
        has_bias = attention_bias if theirs.startswith("attn") else mlp_bias
        for kind in ("weight", "bias") if has_bias else ("weight",):
            tensors[f"layers.{{layer}}.{ours}.{kind}"] = Copy(f"layers.{{layer}}.{theirs}.{kind}")
    if head is None:
        return WeightMap(tensors, ignored=(r"(head|decoder|classifier)\..*",), optional_prefix="model.")
    for kind in ("weight", "bias") if head.dense_bias else ("weight",):
        tensors[f"head.dense.{kind}"] = Copy(f"head.dense.{kind}")
    norm("head.norm", "head.norm")
    if head.tied:
        if head.out_bias:
            tensors["head.bias.weight"] = Copy("decoder.bias")
        return WeightMap(tensors, duplicates=(("decoder.weight", _EMBED),), optional_prefix="model.")
    for kind in ("weight", "bias"):
        tensors[f"head.out.{kind}"] = Copy(f"classifier.{kind}")
    return WeightMap(tensors, optional_prefix="model.")
