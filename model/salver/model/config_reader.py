"""Reads config.json with types, and refuses what it does not know. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError
from .spec import ModelSpec

_T = TypeVar("_T")

# Fields that do not change what a served decoder computes: training, housekeeping, defaults of
# `generate` (sampling is the request's), and what only other heads of the same body read.
HARMLESS = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version use_cache initializer_range
    _name_or_path _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset
    auto_map transformers.js_config bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    decoder_start_token_id forced_eos_token_id attention_dropout hidden_dropout resid_pdrop embd_pdrop
    attn_pdrop classifier_dropout summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout id2label label2id problem_type finetuning_task
    task_specific_params n_ctx is_llama_config gradient_checkpointing output_attentions
    output_hidden_states return_dict return_dict_in_generate output_scores chunk_size_feed_forward
    max_length min_length max_new_tokens do_sample early_stopping temperature top_k top_p typical_p
    num_beams num_beam_groups num_return_sequences diversity_penalty repetition_penalty length_penalty
    reorder_and_upcast_attn resid_dropout embed_dropout hidden_dropout_prob activation_dropout dropout
    layerdrop residual_dropout embedding_dropout attention_probs_dropout_prob emb_pdrop init_std
    output_router_logits router_aux_loss_coef router_jitter_noise cache_implementation
    scale_attention_softmax_in_fp32 attention_softmax_in_fp32 tokenizer_class prefix custom_pipelines
    reorder_and_upcast_attn
    attention_probs_dropout_prob hidden_dropout_prob dropout qa_dropout seq_classif_dropout
    classifier_dropout_prob embedding_dropout mlp_dropout initializer_cutoff_factor cls_token_id
    mask_token_id deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile
    repad_logits_with_grad summary_last_dropout net_structure_type gap_size num_memory_blocks
    down_scale_factor
    """.split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class FieldsRead:
    """What the fields of config.json and generation_config.json that matter are taken for: by name, the value
    and whether the file has it. Fields of a nested object are `object.field`."""

    config: dict[str, tuple[Any, bool]] = dataclasses.field(default_factory=dict)
    generation: dict[str, tuple[Any, bool]] = dataclasses.field(default_factory=dict)


class ConfigReader:
    """Typed access to the fields of a config; remembers which were read.

    Every reading method raises CheckpointError, naming file and field, for a value of another
    type or outside what is supported. A field that is null counts as absent.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        found: dict[str, tuple[Any, bool]] | None = None,
        prefix: str = "",
    ) -> None:
        """`found` is told what every field is taken for, as `FieldsRead` has it; `prefix` is of its names."""
        self._config = config
        self._where = where
        self._read: set[str] = set()
        self._found = {} if found is None else found
        self._prefix = prefix
        self._supposed: dict[str, int] = {}

    def error(self, name: str, problem: str) -> CheckpointError:
        """An error that names the file and the field."""
        return CheckpointError(f"{self._where}: {name} {problem}")

    def _value(self, name: str, wanted: str, *kinds: type) -> Any:
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            raise self.error(name, f"must be {wanted}, not {value!r}")
        if value is not None and kinds != (dict,):
            self._found[self._prefix + name] = (value, True)
        return value

    def _or(self, name: str, value: _T | None, default: _T | None) -> _T:
        if value is not None:
            return value
        default = self._supposed.get(name) if default is None else default  # type: ignore[assignment]
        if default is None:
            raise self.error(name, "is missing")
        self._found[self._prefix + name] = (default, False)
        return default

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def suppose(self, **sizes: int) -> None:
        """What fields are that the config leaves out, where their reader does not say."""
        self._supposed |= sizes

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value: int = self._or(name, self._value(name, "an integer", int), default)
        if value <= 0:
            raise self.error(name, f"must be positive, not {value}")
        return value

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite positive number, or with `zero` also 0."""
        value = float(self._or(name, self._value(name, "a number", int, float), default))
        if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise self.error(name, f"must be a positive number, not {value}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """An integer of at least `least`."""
        value: int = self._or(name, self._value(name, "an integer", int), default)
        if value < least:
            raise self.error(name, f"must be at least {least}, not {value}")
        return value

    def size_or_null(self, name: str, default: int | None) -> int | None:
        """A positive integer; `default` when absent, None when null."""
        return None if self.is_null(name) or not (self.has(name) or default) else self.size(name, default)

    def number_or_null(self, name: str, default: float | None) -> float | None:
        """A positive number; `default` when absent, None when null."""
        return None if self.is_null(name) or not (self.has(name) or default) else self.number(name, default)

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        self._read.add(name)
        return name in self._config and self._config[name] is None

    def fraction(self, name: str, default: float | None = None) -> float:
        """A number above 0, up to 1."""
        value = self.number(name, default)
        if value > 1:
            raise self.error(name, f"must be at most 1, not {value}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite positive numbers."""
        value = self._or(name, self._value(name, "a list of numbers", list), None)
        if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in value):
            raise self.error(name, "must be a list of positive numbers")
        return tuple(float(x) for x in value)

    def indices(self, name: str) -> tuple[int, ...]:
        """A list of integers that are not negative; () when absent."""
        value = self._value(name, "a list of integers", list) or []
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise self.error(name, f"must be a list of integers from 0 on, not {value!r:.200}")
        return tuple(value)

    def pairs(self, name: str) -> tuple[tuple[list[Any], int], ...]:
        """A list of [list, how often]; () when absent."""
        value = self._value(name, "a list of pairs", list) or []
        for pair in value:
            if not (
                isinstance(pair, list)
                and len(pair) == 2
                and isinstance(pair[0], list)
                and type(pair[1]) is int
            ):
                raise self.error(name, f"must be a list of [list, number] pairs, not {value!r:.200}")
        return tuple((pair[0], pair[1]) for pair in value)

    def listed(self, name: str, choices: tuple[object, ...], count: int) -> tuple[Any, ...] | None:
        """A list of `count` values, each one of `choices`; None when absent."""
        value = self._value(name, f"a list of {count} values", list)
        if value is None:
            return None
        if len(value) != count or not all(item in choices for item in value):
            shown = ", ".join(map(str, choices))
            raise self.error(name, f"must be {count} values out of {shown}, not {value!r:.200}")
        return tuple(value)

    def either(self, *names: str) -> str:
        """Of names that mean the same field, the one that is there; the first if none is."""
        return next((name for name in names if self.has(name)), names[0])

    def boolean(self, name: str, default: bool | None = None) -> bool:
        return bool(self._or(name, self._value(name, "true or false", bool), default))

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value: str = self._or(name, self._value(name, "a string", str), default)
        if value not in choices:
            raise self.error(name, f"is {value!r}, which is not supported (supported: {', '.join(choices)})")
        return value

    def only(self, name: str, *allowed: object) -> None:
        """Reads a field of which one value is implemented (or several that mean the same)."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and value not in allowed:
            raise self.error(name, f"is {value!r}, which is not supported (supported: {allowed[0]!r})")

    def ignore(self, *names: str) -> None:
        """Fields that may hold anything: they change nothing here."""
        self._read.update(names)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings; () when absent."""
        value = self._value(name, "a list of strings", list) or []
        if not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of strings, not {value!r}")
        return tuple(value)

    def words(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string in which they stand between bars; () when absent."""
        if isinstance(self._config.get(name), list):
            return self.strings(name)
        value = self._value(name, "a list of strings or one string", str) or ""
        return tuple(word.strip() for word in value.lower().split("|") if word.strip())

    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's outputs, in order: `id2label`; else LABEL_0 and so on, two of them."""
        names = self._value("id2label", "an object", dict)
        if names is not None:
            self._found[f"{self._prefix}id2label"] = (names, True)
        count = self.size("num_labels", 2 if names is None else len(names))
        if names is None:
            return tuple(f"LABEL_{i}" for i in range(count))
        by_id = {str(key): value for key, value in names.items()}
        wanted = [str(i) for i in range(len(by_id))]
        if count != len(by_id) or not all(isinstance(by_id.get(i), str) for i in wanted):
            raise self.error("id2label", "must name the labels 0, 1, ... in full")
        return tuple(by_id[i] for i in wanted)

    def section(self, name: str) -> ConfigReader | None:
        """A nested object, with a reader of its own."""
        value = self._value(name, "an object", dict)
        if value is None:
            return None
        return ConfigReader(value, f"{self._where}: {name}", self._found, f"{self._prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; () when absent."""
        value = self._value(name, "a token id or a list of them", int, list)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def token_id(self, name: str) -> int | None:
        """The first token id of a field that holds one or several."""
        return next(iter(self.token_ids(name)), None)

    def refuse_unread(self) -> None:
        """Refuses every field that no one read and that may change the computation.

        What is switched off (null, false, empty) changes nothing.
        """
        for name, value in self._config.items():
            if name in self._read or name in HARMLESS or value is None or value is False:
                continue
            if value in ({}, [], ""):
                continue
            raise self.error(name, f"is {value!r}: this field is not implemented for this architecture")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return loaded


def read_spec(checkpoint: Path, fields: FieldsRead | None = None) -> ModelSpec:
    """The spec of the checkpoint directory, by the `architectures` of its config.json.

    Token ids in generation_config.json come before those of config.json, as in transformers.
    `fields` is told what was read.
    Raises CheckpointError, naming file and field, for anything that is not implemented.
    """
    from .decoder_heads import decoder_variants, with_head
    from .families import ENCODER_FAMILIES, FAMILIES

    path = checkpoint / "config.json"
    config = read_json(path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(f"{path}: architectures must name one architecture, not {architectures!r}")
    name = architectures[0] if isinstance(architectures[0], str) else ""
    variants = decoder_variants()
    family = FAMILIES.get(variants.get(name, name))
    if family is None:
        raise CheckpointError(
            f"{path}: architectures is {architectures[0]!r}, which is not supported "
            f"(supported: {', '.join(sorted({*FAMILIES, *ENCODER_FAMILIES, *variants}))})"
        )
    fields = fields or FieldsRead()
    reader = ConfigReader(config, str(path), fields.config)
    spec = family(reader)
    reader.only("is_causal", True)  # false, of some embedding models, means attention to both sides
    if name in variants:
        spec = with_head(spec, reader, name)
    reader.refuse_unread()
    _check(spec, reader)
    generation_path = checkpoint / "generation_config.json"
    if not generation_path.is_file():
        return spec
    generation = ConfigReader(read_json(generation_path), str(generation_path), fields.generation)
    bos, eos = generation.token_id("bos_token_id"), generation.token_ids("eos_token_id")
    if spec.encoder is not None:
        start = generation.token_id("decoder_start_token_id")
        spec = dataclasses.replace(
            spec,
            decoder_start_token_id=spec.decoder_start_token_id if start is None else start,
            # As in transformers: where there is such a file, what config.json forces counts no more.
            forced_bos_token_id=generation.token_id("forced_bos_token_id"),
            forced_eos_token_id=generation.token_id("forced_eos_token_id"),
        )
    return dataclasses.replace(
        spec,
        bos_token_id=spec.bos_token_id if bos is None else bos,
        eos_token_ids=eos or spec.eos_token_ids,
    )


def _check(spec: ModelSpec, reader: ConfigReader) -> None:
    """What no single field shows."""
    if spec.num_heads % spec.num_kv_heads:
        raise reader.error(
            "num_key_value_heads", f"({spec.num_kv_heads}) must divide the {spec.num_heads} attention heads"
        )
    experts = spec.experts
    if experts is None:
        return
    if experts.per_token > experts.count:
        raise reader.error(
            "num_experts_per_tok", f"({experts.per_token}) is more than the {experts.count} experts"
        )
    groups = experts.groups
    if experts.count % groups or groups > experts.count // 2 or experts.groups_per_token > groups:
        raise reader.error("n_group", f"({groups}) must divide the {experts.count} experts into several each")
