"""adapter_config.json of a PEFT directory: what a LoRA adapter's tensors mean. No torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .config_reader import read_json
from .errors import CheckpointError

# What says how an adapter was trained or saved, and nothing of what it computes.
OF_TRAINING = frozenset(
    (
        "auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config "
        "lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision "
        "runtime_config task_type"
    ).split()
)
# What is read here; `fan_in_fan_out` is seen in the base, and which layers there are in the tensors.
READ = frozenset(
    (
        "alpha_pattern bias exclude_modules fan_in_fan_out init_lora_weights layers_pattern "
        "layers_to_transform lora_alpha lora_bias modules_to_save peft_type r rank_pattern target_modules "
        "target_parameters trainable_token_indices use_dora use_rslora"
    ).split()
)
_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})
# Initializations that leave the base's weights as they are; others (PiSSA, OLoRA ...) change them.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class AdapterConfig:
    """What is read of it. Every method raises CheckpointError, naming the field."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for what is not implemented."""
        self._path = path
        self._values: dict[str, Any] = read_json(path)
        if self._values.get("peft_type") != "LORA":
            raise self.error(f"peft_type is {self._values.get('peft_type')!r}; LORA was expected")
        for name, value in self._values.items():
            if name not in READ and name not in OF_TRAINING and value not in _NEUTRAL:
                raise self.error(f"{name} is {json.dumps(value)}, which is not implemented")
        start = self._values.get("init_lora_weights")
        if start not in _STARTS:
            raise self.error(f"init_lora_weights is {start!r}, which changes the base's weights")
        if self._values.get("bias", "none") not in ("none", "all", "lora_only"):
            raise self.error(f"bias is {self._values['bias']!r}; none, all or lora_only was expected")

    @property
    def use_dora(self) -> bool:
        return bool(self._values.get("use_dora"))

    @property
    def saves_biases(self) -> bool:
        """Whether the base's biases were trained too."""
        return bool(self._values.get("bias", "none") != "none")

    def rank(self, module: str) -> int:
        value = self._of("rank_pattern", module, "r")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"the rank of {module} is {value!r}; a whole number was expected")
        return value

    def scaling(self, module: str) -> float:
        alpha = self._of("alpha_pattern", module, "lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self.error(f"the alpha of {module} is {alpha!r}, not a number")
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def is_saved(self, module: str) -> bool:
        """Whether a module is one of `modules_to_save` or in one."""
        return any(
            self._matches("modules_to_save", rf"(^|.*\.){name}($|\..*)", module)
            for name in self._names("modules_to_save")
        )

    def is_target(self, module: str) -> bool:
        """Whether a module has low-rank matrices, by PEFT's rules."""
        excluded = self._values.get("exclude_modules")
        if excluded and self._is_named("exclude_modules", excluded, module):
            return False
        targets = self._values.get("target_modules")
        if targets == "all-linear" or targets is None:
            return True
        if not self._is_named("target_modules", targets, module):
            return False
        layers = self._values.get("layers_to_transform")
        if isinstance(targets, str) or layers is None or layers == []:
            return True
        patterns = self._names("layers_pattern")
        found = None
        for pattern in [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns] or [r".*?\.[^.]*\.(\d+)\."]:
            found = found or self._matches("layers_pattern", pattern, module)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)

    @property
    def target_names(self) -> list[str]:
        """Ends of the names of modules and parameters that have low-rank matrices, where they are listed."""
        targets = self._values.get("target_modules")
        listed = [] if targets is None or isinstance(targets, str) else self._names("target_modules")
        return [*listed, *self._names("target_parameters")]

    def is_parameter(self, name: str) -> bool:
        """Whether a parameter, "layers.0.mlp.experts.down_proj", has low-rank matrices of its own."""
        return any(f".{name}".endswith(f".{target}") for target in self._names("target_parameters") if target)

    @property
    def trains_tokens(self) -> bool:
        return bool(self._values.get("trainable_token_indices"))

    @property
    def token_modules(self) -> list[str]:
        """Ends of the names of modules that have rows of some tokens, where they are named."""
        value = self._values.get("trainable_token_indices")
        return list(value) if isinstance(value, dict) else []

    def token_indices(self, module: str) -> list[int] | None:
        """Which tokens' rows a module has anew; None: it is not among those that have."""
        value = self._values.get("trainable_token_indices")
        if isinstance(value, dict):
            value = next((v for name, v in value.items() if f".{module}".endswith(f".{name}")), None)
        if value is None:
            return None
        good = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
        if not good or len(set(value)) < len(value):
            raise self.error(f"trainable_token_indices has {json.dumps(value)}; token ids were expected")
        return list(value)

    def _is_named(self, field: str, wanted: str | list[str], module: str) -> bool:
        """By a regular expression of the whole name, or by its end."""
        if isinstance(wanted, str):
            return self._matches(field, rf"(?:{wanted})\Z", module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _names(self, field: str) -> list[str]:
        value = self._values.get(field) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error(f"{field} is {json.dumps(value)}; names were expected")
        return names

    def _of(self, patterns: str, module: str, otherwise: str) -> Any:
        """As PEFT: the first pattern that matches the end of the module's name, else the common value."""
        for pattern, value in (self._values.get(patterns) or {}).items():
            if self._matches(patterns, rf"(.*\.)?({pattern})$", module):
                return value
        return self._values.get(otherwise)

    def _matches(self, field: str, pattern: str, module: str) -> re.Match[str] | None:
        try:
            return re.match(pattern, module)
        except re.error as error:
            raise self.error(f"{field}: {pattern!r}: {error}") from error

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")
