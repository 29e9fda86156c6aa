"""The hyperparameters of a checkpoint, each with where its value came from. No torch."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from .config_reader import FieldsRead
from .encoder_spec import EncoderSpec
from .generation_config import GenerationConfig
from .spec import ModelSpec, WeightMap

# What the families call a field of the spec in config.json.
_CONFIG_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "ffn_hidden_size"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length",
    ),
    "max_input_tokens": ("max_position_embeddings", "n_positions"),
    "vocab_size": ("vocab_size",),
    "embedding_size": ("embedding_size", "word_embed_proj_dim"),
    "num_segments": ("type_vocab_size",),
    "activation": ("hidden_act", "activation_function", "hidden_activation", "activation"),
    "norm.eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "positions.theta": ("rope_theta", "rope_parameters.rope_theta", "rotary_emb_base"),
    "positions.factor": ("rope_scaling.factor", "rope_parameters.factor"),
    "rope.theta": (
        "global_rope_theta", "rope_theta", "rotary_emb_base", "rope_parameters.rope_theta",
        "rope_parameters.full_attention.rope_theta",
    ),
    "local_rope.theta": ("local_rope_theta", "rope_parameters.sliding_attention.rope_theta"),
    "tied_head": ("tie_word_embeddings",),
    "qkv_bias": ("attention_bias", "qkv_bias", "use_bias", "bias"),
    "attention_out_bias": ("attention_bias", "use_bias", "bias"),
    "mlp_bias": ("mlp_bias", "use_bias", "bias"),
    "bos_token_id": ("bos_token_id",),
    "eos_token_ids": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "labels": ("id2label",),
    "problem_type": ("problem_type",),
    "experts.count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts.per_token": ("num_experts_per_tok",),
    "experts.intermediate_size": ("moe_intermediate_size",),
}  # fmt: skip
_DERIVED = ("head_dim", "num_kv_heads")  # where config.json does not say them
_GENERATION_NAMES = {
    "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "bad_token_sequences": "bad_words_ids",
}  # fmt: skip


class Source(enum.Enum):
    """Where a value came from."""

    CONFIG = "config"  # a field of config.json
    FAMILY = "family"  # config.json says nothing: the architecture's own, or its default
    DERIVED = "derived"  # computed from other fields
    GENERATION_CONFIG = "generation_config"  # a field of generation_config.json


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """`value` is what JSON can hold; `field` the name in the file, where there is one."""

    name: str
    value: Any
    source: Source
    field: str = ""


def hyperparameters(
    spec: ModelSpec | EncoderSpec, fields: FieldsRead, generation: GenerationConfig
) -> tuple[Hyperparameter, ...]:
    """First those of the architecture in our names, then other fields of config.json that were read, then
    what generation_config.json says."""
    found = [_traced(name, value, fields) for name, value in _flat(spec, "")]
    known = {each.field for each in found}
    other_names = {name for each in found for name in _CONFIG_NAMES.get(each.name, ())}
    for name, (value, given) in fields.config.items():
        if not given and name in other_names:
            continue
        if name not in known and value not in ("", [], {}, None):
            found.append(Hyperparameter(name, value, Source.CONFIG if given else Source.FAMILY, name))
    for described in dataclasses.fields(generation):
        name, value = described.name, getattr(generation, described.name)
        if value not in (None, ()) and name != "ignored":
            in_file = _GENERATION_NAMES.get(name, name)
            found.append(Hyperparameter(name, _plain(value), Source.GENERATION_CONFIG, in_file))
    return tuple(found)


def _flat(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields that a spec must have and of those in which it is not the usual."""
    for described in dataclasses.fields(part):
        value = getattr(part, described.name)
        name = prefix + described.name
        if isinstance(value, WeightMap) or value is None:
            continue
        default = described.default
        if default is not MISSING and value == default:
            continue
        if dataclasses.is_dataclass(value):
            if not type(value).__name__.endswith("Spec"):  # one of several kinds
                yield name, type(value).__name__
            yield from _flat(value, f"{name}.")
        else:
            yield name, _plain(value)


def _traced(name: str, value: Any, fields: FieldsRead) -> Hyperparameter:
    """A field counts as the source only where its value is the one that is in force."""
    if name == "architecture":
        return Hyperparameter(name, value, Source.CONFIG, "architectures")
    candidates = _CONFIG_NAMES.get(name, ())
    found = (
        (fields.generation, True, Source.GENERATION_CONFIG),
        (fields.config, True, Source.CONFIG),
        (fields.config, False, Source.DERIVED if name in _DERIVED else Source.FAMILY),
    )
    for read, given, source in found:
        for field in candidates:
            if field in read and read[field][1] is given and _same(read[field][0], value):
                return Hyperparameter(name, value, source, field)
    computed = isinstance(value, int) and not isinstance(value, bool)
    return Hyperparameter(name, value, Source.DERIVED if computed else Source.FAMILY)


def _same(read: Any, value: Any) -> bool:
    if isinstance(read, dict):
        read = [read[key] for key in sorted(read, key=lambda key: int(key) if key.isdigit() else 0)]
    if isinstance(value, list) and not isinstance(read, list | tuple):
        read = [read]
    return bool(_plain(read) == value)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
