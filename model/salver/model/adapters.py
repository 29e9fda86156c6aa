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

    @property
    def rank(self) -> int:
        """The largest of its deltas'."""
        return max(len(delta.a) for deltas in self.deltas.values() for delta in deltas)

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(delta.a.nbytes + delta.b.nbytes for deltas in self.deltas.values() for delta in deltas)


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

    def __init__(
        self,
        model: Transformer,
        adapters: Mapping[str, Adapter],
        row_multiple: int = 1,
        *,
        install: bool = True,
    ) -> None:
        """`row_multiple` as in `numerics.row_multiple`. Without `install` the model stays as it is, with
        the adapters that it has, until that is called."""
        self.adapters = dict(adapters)
        self._numbers = {name: number for number, name in enumerate(adapters)}
        self._active = _Active()
        self._device = model.device
        self._row_multiple = row_multiple
        self._model = model
        self._made = {
            layer: _AdaptedLinear(
                _linear(model, layer), [own.deltas.get(layer, ()) for own in adapters.values()], self._active
            )
            for layer in sorted({layer for adapter in adapters.values() for layer in adapter.deltas})
        }
        if install:
            self.install()

    def install(self) -> None:
        """Puts them there, in the place of another set's."""
        before = [name for name, module in self._model.named_modules() if isinstance(module, _AdaptedLinear)]
        for layer in {*before, *self._made}:
            parent, _, attribute = layer.rpartition(".")
            module = self._made.get(layer) or _linear(self._model, layer)
            setattr(self._model.get_submodule(parent), attribute, module)

    def select(self, parts: Sequence[tuple[str, range]]) -> None:
        """Of the next step, the rows of each part, and the name of its adapter ("" for none)."""
        rows: dict[int, list[int]] = {}
        for name, part in parts:
            if name:
                rows.setdefault(self._numbers[name], []).extend(part)
        active = self._active
        active.adapters = tuple(sorted(rows))
        most = max(map(len, rows.values()), default=0)
        active.width = most + -most % self._row_multiple
        padded, places, targets = list[int](), list[int](), list[int]()
        for number in active.adapters:
            own = rows[number]
            places += range(len(padded), len(padded) + len(own))
            targets += own
            padded += own + own[:1] * (active.width - len(own))
        active.rows, active.places, active.targets = (
            torch.tensor(ids, dtype=torch.int64, device=self._device) for ids in (padded, places, targets)
        )


@dataclass(slots=True)
class _Active:
    """Of a step: its adapters in order, and as many rows of each, padded with its first.

    `places` are those among the padded rows that are no padding, `targets` the step's rows that they are.
    """

    adapters: tuple[int, ...] = ()
    width: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    places: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))


class _AdaptedLinear(nn.Module):
    """A linear layer, and what each adapter adds to it: two products for all adapters together."""

    def __init__(self, base: Linear, deltas: Sequence[Sequence[Delta]], active: _Active) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._base = (base,)  # not a module of ours, whose parameters would count twice
        self._active = active
        rank = max(sum(len(delta.a) for delta in own) for own in deltas)
        out, width = base.weight.shape
        self._a = base.weight.new_zeros((len(deltas), rank, width))
        self._b = base.weight.new_zeros((len(deltas), out, rank))
        for a, b, own in zip(self._a, self._b, deltas, strict=True):
            first = 0
            for delta in own:
                last = first + len(delta.a)
                a[first:last] = delta.a
                b[delta.start : delta.start + len(delta.b), first:last] = delta.b
                first = last
        self._chosen = (tuple(range(len(deltas))), self._a, self._b)  # of the adapters of the last step

    @property
    def base(self) -> Linear:
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        active = self._active
        if not active.adapters:
            return out
        if self._chosen[0] != active.adapters:
            index = torch.tensor(active.adapters, device=x.device)
            self._chosen = (active.adapters, self._a[index], self._b[index])
        _, a, b = self._chosen
        rows = x.index_select(0, active.rows).view(len(active.adapters), active.width, -1)
        added = torch.bmm(torch.bmm(rows, a.mT), b.mT).flatten(0, 1)
        return out.index_add_(0, active.targets, added.index_select(0, active.places))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix of the checkpoint is in ours: a layer, and the first of its output columns."""

    layer: str
    start: int
    size: int


def _places(model: Transformer) -> dict[str, _Place]:
    """By the name of the checkpoint's tensor. The head and the embeddings are not among them."""
    found: dict[str, _Place] = {}
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear | _AdaptedLinear) and name != "head"
    }
    for name, source in model.spec.weights.expanded(model.spec.num_layers).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            for copied, start, length in _copies(source, _linear(model, layer).weight.shape[0]):
                found[copied] = _Place(layer, start, length)
    return found


def _linear(model: Transformer, layer: str) -> Linear:
    """Without the adapters beside it."""
    found = model.get_submodule(layer)
    if isinstance(found, _AdaptedLinear):
        return found.base
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
            raise CheckpointError(f"{file.path}: tensor {module}.lora_{letter}.weight holds NaN or infinity")
    scaled = b.float() * config.scaling(module)
    a = a.to(model.device, model.dtype, copy=True)  # a view of the mapped file would change with it
    return Delta(place.start, a, scaled.to(model.device, model.dtype))


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
