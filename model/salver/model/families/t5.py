"""T5 and its like (Raffel et al. 2020; T5 1.1, Flan-T5, mT5, UMT5): relative buckets, RMSNorm, no biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, RelativeBuckets
from ..spec import (
    ACTIVATIONS,
    LAYER,
    BucketPositions,
    Cat,
    Copy,
    Either,
    ModelSpec,
    NormSpec,
    Source,
    WeightMap,
)
from ..weight_names import Names, weight_map
from . import family

CONTEXT = 2048  # T5 has no bound of its own; `n_positions` is what it was trained with
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_GATED = "gated-"


@family("T5ForConditionalGeneration", "T5WithLMHeadModel")
def t5(c: ConfigReader) -> ModelSpec:
    return t5_spec(c, "T5ForConditionalGeneration", scaled=_scaled(c))


@family("MT5ForConditionalGeneration")
def mt5(c: ConfigReader) -> ModelSpec:
    c.ignore("tie_word_embeddings")  # its head has never been scaled
    return t5_spec(c, "MT5ForConditionalGeneration", scaled=False, usual=_MT5)


@family("UMT5ForConditionalGeneration")
def umt5(c: ConfigReader) -> ModelSpec:
    return t5_spec(c, "UMT5ForConditionalGeneration", scaled=_scaled(c), own=True, usual=_MT5)


def _scaled(c: ConfigReader) -> bool:
    """T5 1.1 has a head of its own and does not scale; transformers 5 calls it tied and says so otherwise."""
    return c.boolean("scale_decoder_outputs", c.boolean("tie_word_embeddings", True))


@dataclass(frozen=True, slots=True)
class _Usual:
    """What holds if the config does not say."""

    heads: int = 8
    inner: int = 2048
    layers: int = 6
    projection: str = "relu"


_T5 = _Usual()
_MT5 = _Usual(6, 1024, 8, "gated-gelu")


def t5_spec(
    c: ConfigReader, architecture: str, *, scaled: bool, own: bool = False, usual: _Usual = _T5
) -> ModelSpec:
    """`scaled`: the head is the embedding and scales; else the head is the checkpoint's, if it has one.

    `own`: every layer has its own table of biases, not the first one for all.
    """
    hidden, heads, head_dim = c.size("d_model", 512), c.size("num_heads", usual.heads), c.size("d_kv", 64)
    buckets = c.size("relative_attention_num_buckets", 32)
    farthest = c.size("relative_attention_max_distance", 128)
    inner, layers = c.size("d_ff", usual.inner), c.size("num_layers", usual.layers)
    activation, gated = _activation(c, usual.projection)
    norm = NormSpec("rms", c.number("layer_norm_epsilon", 1e-6))
    context = max(CONTEXT, c.size("n_positions", 512))
    vocab_size = c.size("vocab_size", 32128)
    c.only("is_encoder_decoder", True)
    c.ignore("dropout_rate", "initializer_factor", "is_gated_act", "dense_act_fn", "output_past")
    c.ignore("num_hidden_layers", "hidden_size", "head_dim", "scalable_attention")
    shape: dict[str, Any] = {"norm": norm, "activation": activation, "gated": gated, "mlp_bias": False}
    shape |= {"qkv_bias": False, "attention_out_bias": False, "attention_multiplier": 1.0}
    encoder = EncoderSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        max_input_tokens=context,
        weights=WeightMap(),
        embedding_norm=False,
        buckets=RelativeBuckets(buckets, farthest, own),
        pre_norm=True,
        final_norm=True,
        head_size=head_dim,
        **shape,
    )
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=c.size("num_decoder_layers", layers),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_position_embeddings=context,
        positions=BucketPositions(buckets, farthest, own),
        tied_head=scaled,
        logit_multiplier=hidden**-0.5 if scaled else 1.0,
        bos_token_id=c.token_id("bos_token_id"),
        eos_token_ids=c.token_ids("eos_token_id"),
        encoder=encoder,
        cross_bias=False,
        decoder_start_token_id=c.token_id("decoder_start_token_id")
        if c.has("decoder_start_token_id")
        else c.integer("pad_token_id", 0),
        **shape,
    )
    return replace(spec, weights=_weights(spec, encoder))


def _activation(c: ConfigReader, usual: str) -> tuple[str, bool]:
    """(name, gated) of `feed_forward_proj`; "gated-gelu" has always meant GELU by tanh."""
    said = c.choice("feed_forward_proj", (*ACTIVATIONS, *(_GATED + name for name in ACTIVATIONS)), usual)
    if said == "gated-gelu":
        return "gelu_new", True
    return said.removeprefix(_GATED), said.startswith(_GATED)


def _block(stack: str, mlp: int, gated: bool) -> dict[str, Any]:
    """Names of a layer's parts; the MLP is its `mlp`th block."""
    layer = f"{stack}.block.{LAYER}.layer"
    dense = f"{layer}.{mlp}.DenseReluDense"
    return {
        "attention_norm": f"{layer}.0.layer_norm",
        "qkv": tuple(f"{layer}.0.SelfAttention.{name}" for name in "qkv"),
        "attention_out": f"{layer}.0.SelfAttention.o",
        "mlp_norm": f"{layer}.{mlp}.layer_norm",
        "up": (f"{dense}.wi_0", f"{dense}.wi_1") if gated else f"{dense}.wi",
        "down": f"{dense}.wo",
    }


def _weights(spec: ModelSpec, encoder: EncoderSpec) -> WeightMap:
    cross = f"decoder.block.{LAYER}.layer.1"
    own = encoder.buckets is not None and encoder.buckets.own
    table = "{stack}.block." + (LAYER if own else "0") + ".layer.0.SelfAttention.relative_attention_bias"
    tied = ("lm_head.weight",) if spec.tied_head else ()
    names: Names = {
        **_block("decoder", 2, spec.gated),
        "embed": lambda _: Either(tuple(map(Copy, (*_EMBEDDINGS, *tied)))),
        "buckets": table.replace("{stack}", "decoder"),
        "cross_norm": f"{cross}.layer_norm",
        "cross.query": f"{cross}.EncDecAttention.q",
        "cross.key_value": (f"{cross}.EncDecAttention.k", f"{cross}.EncDecAttention.v"),
        "cross.out": f"{cross}.EncDecAttention.o",
        "final_norm": "decoder.final_layer_norm",
        "head": lambda _: Either(tuple(map(Copy, ("lm_head.weight", *_EMBEDDINGS)))),
    }
    tensors = dict(weight_map(spec, names).tensors)
    layers: dict[str, tuple[int, ...]] = {}
    width = encoder.num_heads * encoder.head_dim
    for part, theirs in _block("encoder", 1, encoder.gated).items():
        ours = f"encoder.layers.{LAYER}.{part}.weight"
        tensors[ours] = _joined(theirs, width if part == "qkv" else encoder.intermediate_size)
        layers[ours] = tuple(range(encoder.num_layers))
    place = f"encoder.layers.{LAYER}.buckets.weight" if own else "encoder.buckets.weight"
    tensors[place] = Copy(table.replace("{stack}", "encoder") + ".weight")
    if own:
        layers[place] = tuple(range(encoder.num_layers))
    tensors["encoder.final_norm.weight"] = Copy("encoder.final_layer_norm.weight")
    return WeightMap(
        tensors,
        # A table that transformers 2 gave the first cross-attention, and never read.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        duplicates=tuple((name, _EMBEDDINGS[0]) for name in (*_EMBEDDINGS[1:], *tied)),
        layers=layers,
    )


def _joined(names: str | tuple[str, ...], size: int) -> Source:
    if isinstance(names, str):
        return Copy(f"{names}.weight")
    return Cat(tuple(Copy(f"{name}.weight") for name in names), (size,) * len(names))
