"""Reads config.json with types, and refuses what it does not know. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salver.model.errors import CheckpointError
from salver.model.spec import ModelSpec

# Fields that do not change what the model computes when it serves.
_HARMLESS = frozenset(
    (
        "architectures model_type dtype torch_dtype transformers_version use_cache initializer_range "
        "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
        "_name_or_path attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop classifier_dropout "
        "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
        "task_specific_params n_ctx id2label label2id problem_type finetuning_task is_llama_config "
        "transformers.js_config auto_map output_attentions output_hidden_states return_dict "
        "return_dict_in_generate chunk_size_feed_forward max_length min_length do_sample temperature top_k "
        "top_p typical_p repetition_penalty length_penalty num_beams num_return_sequences "
        "gradient_checkpointing _attn_implementation_autoset _commit_hash attn_implementation "
        "_attn_implementation prefix max_window_layers reorder_and_upcast_attn "
    ).split()
)


class ConfigReader:
    """Typed access to a config; remembers what was read, so that the rest can be questioned."""

    def __init__(self, config: Mapping[str, Any], path: Path | str, read: set[str] | None = None) -> None:
        self._config = config
        self._path = path
        self._read = set() if read is None else read

    def _fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {name} {problem}")

    def _get(self, name: str, kind: tuple[type, ...], wanted: str, default: Any) -> Any:
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self._fail(name, "is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise self._fail(name, f"must be {wanted}, not {value!r}")
        return value

    def integer(self, name: str, default: Any = ...) -> int:
        value: int = self._get(name, (int,), "an integer", _REQUIRED if default is ... else default)
        return value

    def positive(self, name: str, default: Any = ...) -> int:
        value = self.integer(name, default)
        if value is not None and value <= 0:
            raise self._fail(name, f"must be positive, not {value}")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        value = self._get(name, (int, float), "a number", _REQUIRED if default is ... else default)
        return float(value)

    def boolean(self, name: str, default: Any = ...) -> bool:
        value: bool = self._get(name, (bool,), "true or false", _REQUIRED if default is ... else default)
        return value

    def string(self, name: str, default: Any = ...) -> str:
        value: str = self._get(name, (str,), "a string", _REQUIRED if default is ... else default)
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: Any = ...) -> str:
        value = self.string(name, default)
        if value not in choices:
            raise self._fail(name, f"is {value!r}; supported: {', '.join(choices)}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses any value but these; an absent one counts as the first."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and value not in allowed:
            raise self._fail(name, f"is {value!r}, which is not supported (only {allowed[0]!r})")

    def section(self, name: str) -> ConfigReader | None:
        """A nested object, or None."""
        value = self._get(name, (dict,), "an object", None)
        return None if value is None else ConfigReader(value, f"{self._path}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self._get(name, (int, list), "a token id or a list of them", [])
        ids = [value] if isinstance(value, int) else value
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self._fail(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def refuse_unknown(self) -> None:
        """Raises CheckpointError for a field that nobody read and that may change the computation."""
        for name, value in self._config.items():
            if name in self._read or name in _HARMLESS:
                continue
            if value is None or value is False or value in ({}, [], ""):
                continue
            raise self._fail(name, f"is {value!r}, which this family does not know")


_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a checkpoint directory?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return loaded


def read_spec(checkpoint: Path) -> ModelSpec:
    """The spec of a checkpoint directory, by the `architectures` of its config.json.

    Raises CheckpointError, naming the field, for anything that is not supported.
    """
    from salver.model.families import FAMILIES

    path = checkpoint / "config.json"
    config = read_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(f"{path}: architectures must name one architecture, not {architectures!r}")
    family = FAMILIES.get(architectures[0])
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"{path}: architecture {architectures[0]} is not supported (supported: {supported})"
        )
    reader = ConfigReader(config, path)
    reader.only("quantization_config", None)
    spec = family(reader)
    reader.refuse_unknown()
    return spec
