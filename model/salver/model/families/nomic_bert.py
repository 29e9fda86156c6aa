"""NomicBERT (Nussbaum et al. 2024): BERT with rotary positions and gated MLPs without biases."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec, HeadSpec
from ..rope_config import rope_positions
from ..spec import Cat, Copy, NormSpec, RopePositions, Source, WeightMap
from . import encoder_family
from .bert import plain_head
from .encoder_names import (
    WORDS,
    HeadNames,
    label_head,
    pair,
    problem_type,
    task_of,
    vocabulary_head,
    weight_map,
)

# Of the first layout, the activation of a gated MLP by the name of the two together.
_GATED = {"swiglu": "silu", "geglu": "gelu"}
_INNER_MULTIPLE = 256  # and its MLPs are as wide as the next multiple
_HEAD = "cls.predictions.transform"
_MODULES = (
    (r"^nomic_bert\.(.*)", r"\1"),
    (r"^embeddings\.LayerNorm\.(.*)", r"emb_ln.\1"),
    *(
        (rf"^layers\.(\d+)\.{theirs}\.(.*)", rf"encoder.layers.\1.{ours}.\2")
        for theirs, ours in (
            (r"self_attn\.o_proj", "attn.out_proj"),
            (r"mlp\.up_proj", "mlp.fc11"),
            (r"mlp\.gate_proj", "mlp.fc12"),
            (r"mlp\.down_proj", "mlp.fc2"),
            ("post_attention_layernorm", "norm1"),
            ("post_mlp_layernorm", "norm2"),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the two published layouts of config.json say under different names."""

    prefix: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_layers: int
    intermediate_size: int
    max_input_tokens: int
    norm: NormSpec
    activation: str
    rope: RopePositions
    qkv_bias: bool = False


@encoder_family(
    *("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForPreTraining"),
    *("NomicBertForSequenceClassification", "NomicBertForTokenClassification"),
)
def nomic_bert(c: ConfigReader, architecture: str) -> EncoderSpec:
    # The code that was published with nomic-embed-text has GPT-2's names; transformers 5 has BERT's.
    first = c.has("n_embd")
    shape = _first_layout(c) if first else _layout(c)
    task, labels, hidden = task_of(architecture), c.labels(), shape.hidden_size
    if task == "PreTraining" and not first:
        raise c.error("architectures", f"is {architecture}, which only the layout with n_embd has")
    head = _head(c, task, shape, len(labels), bias=not first)
    layer = "encoder.layers.{layer}"
    gate_up = (Copy(f"{layer}.mlp.fc12.weight"), Copy(f"{layer}.mlp.fc11.weight"))
    segments = c.integer("type_vocab_size", 2)
    tensors: dict[str, Source] = {
        "embed.weight": Copy(WORDS),
        **pair("embedding_norm", "emb_ln"),
        "layers.{layer}.qkv.weight": Copy(f"{layer}.attn.Wqkv.weight"),
        "layers.{layer}.attention_out.weight": Copy(f"{layer}.attn.out_proj.weight"),
        "layers.{layer}.up.weight": Cat(gate_up, (shape.intermediate_size,) * 2),
        "layers.{layer}.down.weight": Copy(f"{layer}.mlp.fc2.weight"),
        **pair("layers.{layer}.attention_norm", f"{layer}.norm1"),
        **pair("layers.{layer}.mlp_norm", f"{layer}.norm2"),
    }
    if segments:
        tensors["segments.weight"] = Copy("embeddings.token_type_embeddings.weight")
    if shape.qkv_bias:
        tensors["layers.{layer}.qkv.bias"] = Copy(f"{layer}.attn.Wqkv.bias")
        tensors["layers.{layer}.attention_out.bias"] = Copy(f"{layer}.attn.out_proj.bias")
    extras = () if task == "SequenceClassification" else (r"pooler\..*",)
    return EncoderSpec(
        architecture=architecture,
        vocab_size=shape.vocab_size,
        hidden_size=hidden,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_input_tokens=shape.max_input_tokens,
        norm=shape.norm,
        activation=shape.activation,
        weights=_as_modules(weight_map(tensors, head, shape.prefix, ignored=extras), shape),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        num_segments=segments,
        rope=shape.rope,
        gated=True,
        qkv_bias=shape.qkv_bias,
        attention_out_bias=shape.qkv_bias,
        mlp_bias=False,
        pad_token_id=c.token_id("pad_token_id"),
    )


def _as_modules(weights: WeightMap, shape: _Shape) -> WeightMap:
    """With the names of transformers 5's modules, which adapters bear."""
    layer = "layers.{layer}.self_attn"
    parts = tuple(Copy(f"{layer}.{name}_proj.weight") for name in "qkv")
    qkv: dict[str, Source] = {"layers.{layer}.qkv.weight": Cat(parts, (shape.hidden_size,) * 3)}
    return replace(weights, renames=(*weights.renames, *_MODULES), modules=qkv)


def _layout(c: ConfigReader) -> _Shape:
    c.suppose(
        vocab_size=30528, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=2048,
    )  # fmt: skip
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    head_dim = _head_dim(c, "num_attention_heads", hidden, num_heads)
    c.only("head_dim", head_dim)
    rope = rope_positions(c, head_dim) if c.has("rope_parameters") else RopePositions(1000.0)
    if rope.grows:  # its angles depend on an input's length
        raise c.error("rope_parameters", f"asks for {rope.scaling!r}, which is not supported for encoders")
    return _Shape(
        prefix="nomic_bert.",
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_layers=c.size("num_hidden_layers"),
        intermediate_size=c.size("intermediate_size"),
        max_input_tokens=c.size("max_position_embeddings"),
        norm=NormSpec("layer", c.number("layer_norm_eps", 1e-12)),
        activation=c.choice("hidden_act", ("silu", "swish", "gelu"), "silu"),
        rope=rope,
    )


def _first_layout(c: ConfigReader) -> _Shape:
    """Of nomic-embed-text-v1 and v1.5; defaults are those of the code that came with them."""
    hidden, num_heads = c.size("n_embd"), c.size("n_head")
    head_dim = _head_dim(c, "n_head", hidden, num_heads)
    fraction = c.number("rotary_emb_fraction", 0.0, zero=True)
    rotary_dim = int(head_dim * fraction)
    if not 0 < fraction <= 1 or rotary_dim % 2 or rotary_dim == 0:
        raise c.error("rotary_emb_fraction", f"is {fraction}; above 0 to 1, of an even part, is supported")
    # What makes the angles depend on an input's length, or computes something else.
    for name, value in (
        ("rotary_scaling_factor", None), ("rotary_emb_scale_base", None), ("rotary_emb_interleaved", False),
        ("rotary_head_dim", False), ("prenorm", False), ("parallel_block", False), ("use_rms_norm", False),
        ("causal", False), ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
        ("num_heads_kv", num_heads), ("hidden_size", hidden), ("num_attention_heads", num_heads),
    ):  # fmt: skip
        c.only(name, value)
    for name in ("mlp_fc1_bias", "mlp_fc2_bias"):
        if c.boolean(name, True):
            raise c.error(name, "is true (or left out, which means that), which is not supported")
    # Of training, and of how that code computes the same.
    c.ignore(
        "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "last_layer_subset", "use_flash_attn",
        "use_xentropy", "parallel_block_tied_norm", "max_trained_positions", "add_pooling_layer",
        "mask_token_prob",
    )  # fmt: skip
    multiple = c.size("pad_vocab_size_multiple", 1)
    return _Shape(
        prefix="bert.",
        vocab_size=-(-c.size("vocab_size") // multiple) * multiple,
        hidden_size=hidden,
        num_heads=num_heads,
        num_layers=c.size("n_layer"),
        intermediate_size=-(-c.size("n_inner") // _INNER_MULTIPLE) * _INNER_MULTIPLE,
        max_input_tokens=c.size("n_positions", 1024),
        norm=NormSpec("layer", c.number("layer_norm_epsilon", 1e-5)),
        activation=_GATED[c.choice("activation_function", tuple(_GATED))],
        rope=RopePositions(
            c.number("rotary_emb_base", 10000.0), rotary_dim=0 if rotary_dim == head_dim else rotary_dim
        ),
        qkv_bias=c.boolean("qkv_proj_bias", True),
    )


def _head_dim(c: ConfigReader, field: str, hidden: int, num_heads: int) -> int:
    if hidden % num_heads or hidden // num_heads % 2:
        raise c.error(field, f"({num_heads}) must cut the {hidden} values of a token into even parts")
    return hidden // num_heads


def _head(c: ConfigReader, task: str, shape: _Shape, num_labels: int, *, bias: bool) -> HeadNames | None:
    """`bias`: a vocabulary head has them."""
    hidden = shape.hidden_size
    if task in ("MaskedLM", "PreTraining"):
        names = (f"{_HEAD}.dense", f"{_HEAD}.layer_norm", "cls.predictions.bias", "cls.predictions.decoder")
        if bias:
            return vocabulary_head(c, shape.vocab_size, hidden, shape.activation, shape.norm, names)
        spec = HeadSpec(
            "vocabulary", shape.vocab_size, dense_size=hidden, dense_bias=False, activation=shape.activation,
            norm=shape.norm, out_bias=False, tied=True,
        )  # fmt: skip
        return HeadNames(spec, names[0], names[1], copies=((f"{names[3]}.weight", WORDS),))
    if task == "SequenceClassification":
        return label_head("input", num_labels, "classifier", dense="pooler.dense", dense_size=hidden)
    return plain_head(task, num_labels)
