"""Keys and queries of distances (`disentangled`) under adapters.

They are made once, of weights that adapters change: so every adapter that does has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .adapter_reader import Adapter
from .disentangled import DistanceRows, DistanceScores, Product
from .encoder import Encoder, EncoderLayer
from .layers import Weights

_NORM = "distances.norm"


def is_of_distances(layer: str) -> bool:
    """Whether no step computes this module, but keys or queries of distances are made of it."""
    return layer == _NORM or ".distance." in layer


class AdaptedDistances:
    """Of each layer of an encoder, the rows of each adapter that has others than the base."""

    def __init__(self, model: Encoder, adapters: Sequence[Adapter], owner: Callable[[int], int]) -> None:
        """`owner` says whose a row of the step is, -1 nobody's."""
        self._owner = owner
        self._scores: list[tuple[DistanceScores, dict[int, DistanceRows]]] = []
        tables = {number: _table(model, adapter) for number, adapter in enumerate(adapters)}
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, EncoderLayer) and layer.distance is not None
            scores, found = layer.distance, dict[int, DistanceRows]()
            of = {
                f"layers.{index}.qkv": layer.qkv,
                f"layers.{index}.distance.key": scores.key,
                f"layers.{index}.distance.query": scores.query,
            }
            for number, adapter in enumerate(adapters):
                changed = {name.rpartition(".")[0] for name in adapter.replaced} | set(adapter.low_rank)
                if changed & {_NORM, *of}:
                    qkv, key, query = (
                        None if module is None else _product(adapter, name, module)
                        for name, module in of.items()
                    )
                    assert qkv is not None
                    found[number] = scores.rows(tables[number], qkv, key, query)
            self._scores.append((scores, found))

    def install(self) -> None:
        for scores, found in self._scores:
            scores.others = self._chosen(found) if found else None

    def _chosen(self, found: Mapping[int, DistanceRows]) -> Callable[[int], DistanceRows | None]:
        return lambda row: found.get(self._owner(row))


@torch.inference_mode()
def _table(model: Encoder, adapter: Adapter) -> Tensor:
    """[2 num_buckets, hidden]: vectors of distances, under an adapter's norm."""
    assert model.distances is not None
    table, norm = model.distances.weight, model.distances.norm
    if norm is None:
        return table
    weight, bias = (
        value if value is None else adapter.replaced.get(f"{_NORM}.{kind}", value).to(table)
        for kind, value in (("weight", norm.weight), ("bias", norm.bias))
    )
    return norm.scaled(table, weight, bias)


@torch.inference_mode()
def _product(adapter: Adapter, name: str, module: Weights) -> Product:
    """Weight and bias under an adapter."""
    like, change = module.weight, adapter.low_rank.get(name)
    weight = adapter.replaced.get(f"{name}.weight", like).to(like)
    if change is not None:
        weight = weight + (change.b @ change.a).to(like)
        if change.scale is not None:
            weight = weight * change.scale.to(like)[:, None]
    bias = adapter.replaced.get(f"{name}.bias", module.bias)
    return weight, None if bias is None else bias.to(like)
