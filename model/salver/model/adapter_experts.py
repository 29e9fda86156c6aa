"""Low-rank matrices of experts: one for all of a layer's experts together, or one for each.

transformers 5 keeps the matrices of a layer's experts as one parameter, which PEFT adapts as such
(`target_parameters`); before, every expert was modules of its own.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter_base import AdapterBase
from .adapter_tensors import RowTrace
from .experts import ExpertProducts
from .spec import Stack, names_of

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*\bexperts")
# Of transformers' modules of experts, in their order; PEFT wraps one around the other.
PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_OURS = {"gate_up_proj": "up", "down_proj": "down"}

Matrices = tuple[Tensor, Tensor]  # [rank, in] and [out, rank]


class ExpertMatrices:
    """Collects what an adapter adds to the experts of each layer."""

    def __init__(self, base: AdapterBase) -> None:
        self._base = base
        self._found: dict[str, dict[int, Matrices]] = {}

    def layer_of(self, module: str, parameter: str) -> str | None:
        """Our module, "layers.0.experts.up", of a parameter of one of theirs; None: there is none."""
        match = _LAYER.fullmatch(module)
        if match is None or parameter not in _OURS:
            return None
        layer = f"layers.{match[1]}.experts.{_OURS[parameter]}"
        return layer if self._base.kinds.get(layer) is ExpertProducts else None

    def shape(self, layer: str) -> tuple[int, int, int]:
        """Experts, outputs, inputs."""
        experts, out, width = self._base.shapes[f"{layer}.weight"]
        return experts, out, width

    def put_all(self, layer: str, a: Tensor, b: Tensor) -> None:
        """Of all experts: a [experts x rank, in], b [out, rank x experts], as PEFT stores them."""
        experts, out, width = self.shape(layer)
        source = self._base.sources[f"{layer}.weight"]
        # Matrices that are tensors of their own are put together in our order, gate before up.
        order = torch.arange(out)
        if not isinstance(source, Stack):
            order = RowTrace().order(source, experts, out)
        all_a = a.view(experts, -1, width)
        all_b = b.view(out, -1, experts).permute(2, 0, 1)[:, order]
        for expert in range(experts):
            self.put(layer, expert, all_a[expert], all_b[expert])

    def rows(self, layer: str, weight: str) -> tuple[int, Tensor, Tensor, int]:
        """Of the tensor that is (a part of) an expert's matrix: the expert, and as `RowTrace.rows`."""
        source, out = self._base.sources[f"{layer}.weight"], self.shape(layer)[1]
        assert isinstance(source, Stack)
        expert = next(e for e, part in enumerate(source.sources) if weight in names_of(part))
        return expert, *RowTrace().rows(source.sources[expert], out, weight)

    def put(self, layer: str, expert: int, a: Tensor, b: Tensor) -> None:
        """Of one expert: a [rank, in], b [out, rank]."""
        found = self._found.setdefault(layer, {})
        if expert in found:
            before = found[expert]
            a, b = torch.cat((before[0], a)), torch.cat((before[1], b), dim=1)
        found[expert] = (a, b)

    def stacked(self) -> dict[str, Matrices]:
        """By layer a [experts, rank, in] and b [experts, out, rank]; zeros where an expert has less rank."""
        whole: dict[str, Matrices] = {}
        for layer, found in self._found.items():
            experts, out, width = self.shape(layer)
            rank = max(len(a) for a, _ in found.values())
            all_a, all_b = torch.zeros(experts, rank, width), torch.zeros(experts, out, rank)
            for expert, (a, b) in found.items():
                all_a[expert] = F.pad(a, (0, 0, 0, rank - len(a)))
                all_b[expert] = F.pad(b, (0, rank - len(a)))
            whole[layer] = (all_a, all_b)
        return whole
