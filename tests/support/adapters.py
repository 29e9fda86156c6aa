"""Random PEFT adapters of any model, and what peft says under them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from support.stack import Stack
from torch import Tensor

from salver.model.adapters import AdapterSet


def name_of(model: Any, module: Any) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def norms_of(model: Any) -> list[str]:
    """Names of some norms: the first and the last that have weights."""
    found = [
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and any(True for _ in module.parameters())
    ]
    return [found[0], found[-1]] if found else []


def kinds_of(model: Any) -> dict[str, dict[str, Any]]:
    """Of a causal model: every way of adapting it, as fields of LoraConfig."""
    embed, head = (
        name_of(model, module) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    linear: dict[str, Any] = {"target_modules": "all-linear"}
    mixed: dict[str, Any] = {}
    plain = linear
    if any("experts" in name for name, _ in model.named_modules()):
        # Experts are parameters, to which nothing but plain matrices is added; "all-linear" means them too.
        plain = {"target_modules": r".*self_attn\.\w+_proj"}
        router = next(
            name for name, _ in model.named_parameters() if re.search(r"\.(gate|router)\.weight", name)
        )
        mixed["experts"] = {
            "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", router],
            "r": 3, "rank_pattern": {r".*\.down_proj": 2}, "alpha_pattern": {r".*\.gate_up_proj": 11},
        }  # fmt: skip
        mixed["one"] = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 2}
    return {
        "lora": {**linear, "r": 3, "lora_alpha": 5, "use_rslora": True},
        "dora": {**plain, "r": 2, "lora_alpha": 3, "use_dora": True, "bias": "lora_only"},
        "saved": {**plain, "r": 2, "bias": "all", "modules_to_save": [*norms_of(model), head]},
        "embed": {"target_modules": [embed, head], "r": 2, "lora_alpha": 6, "use_dora": True},
        "table": {"target_modules": [head], "r": 2, "lora_bias": True, "modules_to_save": [embed]},
        "tokens": {**plain, "r": 1, "trainable_token_indices": {embed: list(range(0, 90, 9))}},
        **mixed,
    }


def write_random_adapter(model: Any, directory: Path, seed: int, **config: Any) -> Any:
    """The adapter's directory; gives peft's model, whose trained tensors are random."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**config)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name:  # peft begins with B = 0
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return adapted


class AdaptedStack(Stack):
    """A stack whose sequences have adapters, by their numbers."""

    adapters: AdapterSet
    names: dict[int, str]

    def put(self, adapters: AdapterSet) -> None:
        self.adapters, self.names = adapters, {}

    def read(self, sources: dict[int, Sequence[int]]) -> None:
        order = sorted(sources, key=lambda sequence: len(sources[sequence]))
        self.adapters.select_sources([(self.names.get(s, ""), len(sources[s])) for s in order])
        super().read(sources)

    def step(self, parts: Sequence[tuple[int, Sequence[int]]], padding: int = 0) -> list[Tensor]:
        rows, begin = [], 0
        for sequence, tokens in parts:
            rows.append((self.names.get(sequence, ""), range(begin, begin + len(tokens))))
            begin += len(tokens)
        self.adapters.select(rows)
        model, whole = self.model, list(rows)

        class Selecting:
            """Tells the adapters which rows the head reads, as the runner does."""

            def __call__(self, *inputs: Any) -> Tensor:
                hidden: Tensor = model(*inputs)
                return hidden

            def logits(inner, hidden: Tensor) -> Tensor:
                self.adapters.select_head(whole.pop(0)[1])
                return model.logits(hidden)

        self.model = Selecting()  # type: ignore[assignment]
        try:
            return super().step(parts, padding)
        finally:
            self.model = model
