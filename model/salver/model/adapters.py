"""LoRA adapters (Hu et al. 2021) beside a model's weights: PEFT directories, several in one batch.

Nothing is merged: each row of a step gets the product of its own adapter added, and rows without one
get none. So the base and any number of adapters share a batch, a cache and the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_reader import read_json
from .errors import CheckpointError
from .layers import Linear
from .spec import Cat, Copy, Source, Transpose
from .transformer import Transformer
from .weights import PickleFile, SafetensorsFile, WeightFile

_FILES = (("adapter_model.safetensors", SafetensorsFile), ("adapter_model.bin", PickleFile))
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Of adapter_config.json, what changes an answer and is not implemented, with its neutral values.
_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": ([],),
    "bias": ("none",),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_dora": (False,),
}
_CHANGES_BASE = ("corda", "eva", "loftq", "olora", "pissa")  # initializations that alter the base's weights


@dataclass(frozen=True, slots=True)
class Delta:
    """x A^T B^T is added to columns `start : start + len(b)` of a product. A [r, in], B [out, r], scaled."""

    start: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Deltas by the name of our linear layer, as "layers.0.qkv"; digest of the files, in hex."""

    deltas: Mapping[str, Sequence[Delta]]
    digest: str


def load_adapter(path: Path, model: Transformer) -> Adapter:
    """The adapter in a PEFT directory, on the model's device and in its dtype.

    Raises CheckpointError, naming file and tensor or field, for what is missing, misshaped, of another
    model or not implemented.
    """
    config_path = path / "adapter_config.json"
    config = _Config(config_path, read_json(config_path))
    file = _open(path)
    places = _places(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name in file.names:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file.path}: tensor {name} is not implemented")
        pairs.setdefault(match[1], {})[match[2]] = file.read(name)
    if not pairs:
        raise CheckpointError(f"{file.path}: there are no tensors")
    deltas: dict[str, list[Delta]] = {}
    prefix = model.spec.weights.optional_prefix
    for module, pair in sorted(pairs.items()):
        place = places.get(f"{module.removeprefix(prefix)}.weight")
        if place is None:
            raise CheckpointError(f"{file.path}: tensor {module}.lora_A.weight is of no layer of this model")
        if len(pair) != 2:
            raise CheckpointError(f"{file.path}: tensor {module}.lora_{'AB'['A' in pair]}.weight is missing")
        deltas.setdefault(place.layer, []).append(_delta(file, module, pair, place, config, model))
    digest = hashlib.sha256(config_path.read_bytes() + file.path.read_bytes()).hexdigest()
    return Adapter(deltas, digest)


class AdapterSet:
    """The adapters of a model, put beside its linear layers. `select` says which rows are whose."""

    def __init__(self, model: Transformer, adapters: Mapping[str, Adapter], row_multiple: int = 1) -> None:
        """`row_multiple` as in `numerics.row_multiple`."""
        self.digests = {name: adapter.digest for name, adapter in adapters.items()}
        self._active = _Active()
        self._device = model.device
        self._row_multiple = row_multiple
        for layer in sorted({layer for adapter in adapters.values() for layer in adapter.deltas}):
            of_layer = {name: a.deltas[layer] for name, a in adapters.items() if layer in a.deltas}
            parent, _, attribute = layer.rpartition(".")
            made = _AdaptedLinear(_linear(model, layer), of_layer, self._active)
            setattr(model.get_submodule(parent), attribute, made)

    def select(self, parts: Sequence[tuple[str, range]]) -> None:
        """Of the next step, the rows of each part, and the name of its adapter ("" for none)."""
        rows: dict[str, list[int]] = {}
        for name, part in parts:
            if name:
                rows.setdefault(name, []).extend(part)
        self._active.segments = []
        for name, ids in rows.items():
            padding = ids[:1] * (-len(ids) % self._row_multiple)
            index = torch.tensor(ids + padding, device=self._device)
            self._active.segments.append((name, index, len(ids)))


@dataclass(slots=True)
class _Active:
    """Of a step: adapter, its rows padded with its first to a multiple, and how many there really are."""

    segments: list[tuple[str, Tensor, int]] = field(default_factory=list)


class _AdaptedLinear(nn.Module):
    """A linear layer, and what each adapter adds to it."""

    def __init__(self, base: Linear, deltas: Mapping[str, Sequence[Delta]], active: _Active) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._deltas = deltas
        self._active = active

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        for name, rows, count in self._active.segments:
            for delta in self._deltas.get(name, ()):
                added = F.linear(F.linear(x.index_select(0, rows), delta.a), delta.b)[:count]
                out[:, delta.start : delta.start + len(delta.b)].index_add_(0, rows[:count], added)
        return out


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix of the checkpoint is in ours: a layer, and the first of its output columns."""

    layer: str
    start: int
    size: int


def _places(model: Transformer) -> dict[str, _Place]:
    """By the name of the checkpoint's tensor. The head and the embeddings are not among them."""
    found: dict[str, _Place] = {}
    layers = {name for name, module in model.named_modules() if isinstance(module, Linear) and name != "head"}
    for name, source in model.spec.weights.expanded(model.spec.num_layers).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            for copied, start, length in _copies(source, _linear(model, layer).weight.shape[0]):
                found[copied] = _Place(layer, start, length)
    return found


def _linear(model: Transformer, layer: str) -> Linear:
    found = model.get_submodule(layer)
    if not isinstance(found, Linear):
        raise TypeError(f"{layer} is a {type(found).__name__}")
    return found


def _copies(source: Source, size: int) -> Iterator[tuple[str, int, int]]:
    if isinstance(source, Copy):
        yield source.name, 0, size
    elif isinstance(source, Transpose) and isinstance(source.source, Copy):
        yield source.source.name, 0, size
    elif isinstance(source, Cat) and source.dim == 0:
        start = 0
        for part, length in zip(source.sources, source.sizes, strict=True):
            for name, inner, inner_length in _copies(part, length):
                yield name, start + inner, inner_length
            start += length


def _delta(
    file: WeightFile, module: str, pair: dict[str, Tensor], place: _Place, config: _Config, model: Transformer
) -> Delta:
    a, b = pair["A"], pair["B"]
    rank = config.rank(module)
    width = _linear(model, place.layer).weight.shape[1]
    for letter, tensor, shape in (("A", a, [rank, width]), ("B", b, [place.size, rank])):
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{file.path}: tensor {module}.lora_{letter}.weight has shape {list(tensor.shape)}, "
                f"{shape} was expected"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file.path}: tensor {module}.lora_{letter}.weight is not of finite numbers"
            )
    scaled = b.float() * config.scaling(module)
    return Delta(place.start, a.to(model.device, model.dtype), scaled.to(model.device, model.dtype))


class _Config:
    """adapter_config.json."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        """Raises CheckpointError for what is not implemented."""
        self._path = path
        self._values = values
        if values.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {values.get('peft_type')!r}; LORA was expected")
        for name, neutral in _NOT_IMPLEMENTED.items():
            if (value := values.get(name)) is not None and value not in neutral:
                raise CheckpointError(f"{path}: {name} is {json.dumps(value)}, which is not implemented")
        start = values.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise CheckpointError(f"{path}: init_lora_weights is {start!r}, which changes the base's weights")

    def rank(self, module: str) -> int:
        value = self._of("rank_pattern", module, "r")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self._path}: the rank of {module} is {value!r}; a whole number was expected"
            )
        return value

    def scaling(self, module: str) -> float:
        alpha = self._of("alpha_pattern", module, "lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self._path}: the alpha of {module} is {alpha!r}, not a number")
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def _of(self, patterns: str, module: str, otherwise: str) -> Any:
        """As PEFT: the first pattern that matches the end of the module's name, else the common value."""
        for pattern, value in (self._values.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self._path}: {patterns}: {pattern!r}: {error}") from error
        return self._values.get(otherwise)


def _open(path: Path) -> WeightFile:
    for name, kind in _FILES:
        if (path / name).is_file():
            return kind(path / name)
    raise CheckpointError(f"{path}: neither {' nor '.join(name for name, _ in _FILES)}")
