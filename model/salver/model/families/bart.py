"""BART (Lewis et al. 2019) and mBART (Liu et al. 2020): encoder-decoders with learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, PositionTable
from ..spec import (
    ACTIVATIONS,
    LAYER,
    Cat,
    Copy,
    Either,
    LearnedPositions,
    ModelSpec,
    NormSpec,
    Optional,
    Positions,
    SinusoidalPositions,
    Source,
    WeightMap,
)
from ..weight_names import Names, weight_map
from . import family

DECODER = f"model.decoder.layers.{LAYER}"
EMBEDDINGS = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
# Of old configs: what changes nothing, or says what the other fields say too.
_PASSED_OVER = (
    "num_hidden_layers", "hidden_size", "extra_pos_embeddings", "_num_labels", "classif_dropout",
    "output_past", "replacing_rate", "save_step", "student_encoder_layers", "student_decoder_layers",
    "bad_words_ids", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "forced_bos_token_id",
    "encoder_layerdrop", "decoder_layerdrop", "force_bos_token_to_be_generated", "use_bfloat16",
    "remove_invalid_values",
)  # fmt: skip


@family("BartForConditionalGeneration", "BartModel")
def bart(c: ConfigReader) -> ModelSpec:
    return bart_spec(c, "BartForConditionalGeneration", start=2, forced_eos=2)


@family("MBartForConditionalGeneration")
def mbart(c: ConfigReader) -> ModelSpec:
    return bart_spec(c, "MBartForConditionalGeneration", norm_before=True, forced_eos=2)


def bart_spec(
    c: ConfigReader,
    architecture: str,
    *,
    norm_before: bool = False,
    embedding_norm: bool = True,
    positions: Positions = LearnedPositions(offset=2),  # noqa: B008 - it is frozen
    table: PositionTable | None = PositionTable(offset=2),  # noqa: B008
    sinusoids: SinusoidalPositions | None = None,
    activation: str = "gelu",
    scaled: bool = False,
    start: int | None = None,
    forced_eos: int | None = None,
    context: int = 1024,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **differences: Any,
) -> ModelSpec:
    """The common shape: LayerNorm, heads that share the hidden size, a plain MLP, biases, a tied head.

    `activation`, `scaled`, `start`, `forced_eos`, `context` and `sizes` are what holds if the config does not
    say.
    """

    def size(name: str, usual: int) -> int:
        return c.size(name, sizes.get(name, usual))

    hidden = size("d_model", 1024)
    _read_old_fields(c, norm_before, embedding_norm, static=sinusoids is not None)
    norm = NormSpec("layer", 1e-5)
    multiplier = hidden**0.5 if c.boolean("scale_embedding", scaled) else 1.0
    shape: dict[str, Any] = {
        "activation": c.choice("activation_function", ACTIVATIONS, activation),
        "embedding_multiplier": multiplier,
        "norm": norm,
    }
    context = c.size("max_position_embeddings", context)
    encoder = EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=size("encoder_layers", 12),
        num_heads=_divisor(c, "encoder_attention_heads", size("encoder_attention_heads", 16), hidden),
        intermediate_size=size("encoder_ffn_dim", 4096),
        max_input_tokens=context,
        weights=WeightMap(),
        embedding_norm=embedding_norm,
        positions=table,
        sinusoids=sinusoids,
        pre_norm=norm_before,
        final_norm=norm_before,
        **shape,
    )
    heads = _divisor(c, "decoder_attention_heads", size("decoder_attention_heads", 16), hidden)
    logit_bias = differences.pop("logit_bias", True)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=differences.pop("vocab_size", encoder.vocab_size),
        hidden_size=hidden,
        num_layers=size("decoder_layers", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=size("decoder_ffn_dim", 4096),
        max_position_embeddings=context,
        positions=positions,
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_head=True,
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
        norm_place="pre" if norm_before else "post",
        embedding_norm=norm if embedding_norm else None,
        final_norm=norm_before,
        encoder=encoder,
        logit_bias=logit_bias,
        decoder_start_token_id=_token_or(c, "decoder_start_token_id", start),
        forced_bos_token_id=_forced_bos(c),
        forced_eos_token_id=_token_or(c, "forced_eos_token_id", forced_eos),
        **shape,
        **differences,
    )
    c.only("tie_word_embeddings", True)
    return replace(spec, weights=bart_weights(spec, encoder))


def _divisor(c: ConfigReader, name: str, heads: int, hidden: int) -> int:
    if hidden % heads:
        raise c.error(name, f"({heads}) must divide d_model ({hidden})")
    return heads


def _token_or(c: ConfigReader, name: str, default: int | None) -> int | None:
    """A token id; the default of transformers' class where the config does not have the field."""
    return c.token_id(name) if c.has(name) or c.is_null(name) else default


def _forced_bos(c: ConfigReader) -> int | None:
    forced = c.token_id("forced_bos_token_id")
    if forced is None and c.boolean("force_bos_token_to_be_generated", False):
        return c.token_id("bos_token_id")
    return forced


def _read_old_fields(c: ConfigReader, norm_before: bool, embedding_norm: bool, *, static: bool) -> None:
    """Before transformers 4 one class served all these families, and fields said which it was."""
    c.only("is_encoder_decoder", True)
    c.only("is_decoder", False)
    c.only("normalize_before", norm_before)
    c.only("add_final_layer_norm", norm_before)
    c.only("normalize_embedding", embedding_norm)
    c.only("static_position_embeddings", static)
    c.only("add_bias_logits", False)
    c.ignore(*_PASSED_OVER)


# ---- names ----

# Sinusoids, which are computed; and fairseq's version of its own format.
_IGNORED = (
    r"model\.(encoder|decoder)\.embed_positions\.weights?",
    r"model\.(encoder|decoder)\.version",
)

_LAYER = {
    "attention_out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "up": "fc1",
    "down": "fc2",
    "mlp_norm": "final_layer_norm",
}
_CROSS = {
    "cross.query": "encoder_attn.q_proj",
    "cross.out": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
}


def _qkv(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"


def bart_weights(spec: ModelSpec, encoder: EncoderSpec) -> WeightMap:
    """Of encoder and decoder. The shared table stands under one or several of its names."""
    names: Names = {
        **{ours: f"{DECODER}.{theirs}" for ours, theirs in (_LAYER | _CROSS).items()},
        "qkv": _qkv(f"{DECODER}.self_attn"),
        "cross.key_value": _qkv(f"{DECODER}.encoder_attn")[1:],
        "embed": _embeddings(spec, "model.decoder.embed_tokens"),
        "positions": "model.decoder.embed_positions",
        "embedding_norm": "model.decoder.layernorm_embedding",
        "final_norm": "model.decoder.layer_norm",
        "logit_bias": lambda _: Optional(Copy("final_logits_bias"), (1, spec.vocab_size)),
    }
    decoder = weight_map(spec, names)
    tensors, layers = encoder_tensors(encoder, spec)
    first = EMBEDDINGS[0] if not spec.own_embedding else "model.decoder.embed_tokens"
    copies = ("lm_head", *(() if spec.own_embedding else EMBEDDINGS[1:]))
    return WeightMap(
        decoder.tensors | tensors,
        ignored=(*_IGNORED, r"model\.shared\.weight") if spec.own_embedding else _IGNORED,
        duplicates=tuple((f"{name}.weight", f"{first}.weight") for name in copies),
        optional_prefix="",
        # BartModel and its like were saved without the prefix.
        renames=((r"^((?:encoder|decoder|shared)\..*)", r"model.\1"),),
        layers=layers,
    )


def _embeddings(spec: ModelSpec, own: str) -> Any:
    if spec.own_embedding:
        return own
    return lambda kind: Either(tuple(Copy(f"{name}.{kind}") for name in (*EMBEDDINGS, "lm_head")))


def encoder_tensors(
    encoder: EncoderSpec, spec: ModelSpec
) -> tuple[dict[str, Source], dict[str, tuple[int, ...]]]:
    """Our names of the encoder's tensors and their sources; and in which layers they are."""
    prefix, ours = f"model.encoder.layers.{LAYER}", f"encoder.layers.{LAYER}"
    found: dict[str, Source] = {}
    for kind in ("weight", "bias"):
        parts = tuple(Copy(f"{name}.{kind}") for name in _qkv(f"{prefix}.self_attn"))
        found[f"{ours}.qkv.{kind}"] = Cat(parts, (encoder.hidden_size,) * 3)
        for part, theirs in _LAYER.items():
            found[f"{ours}.{part}.{kind}"] = Copy(f"{prefix}.{theirs}.{kind}")
        if encoder.embedding_norm:
            found[f"encoder.embedding_norm.{kind}"] = Copy(f"model.encoder.layernorm_embedding.{kind}")
        if encoder.final_norm:
            found[f"encoder.final_norm.{kind}"] = Copy(f"model.encoder.layer_norm.{kind}")
    if encoder.positions is not None and encoder.sinusoids is None:
        found["encoder.positions.weight"] = Copy("model.encoder.embed_positions.weight")
    if spec.own_embedding:
        found["encoder.embed.weight"] = Copy("model.encoder.embed_tokens.weight")
    everywhere = tuple(range(encoder.num_layers))
    return found, {name: everywhere for name in found if LAYER in name}
