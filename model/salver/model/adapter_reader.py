"""Reads LoRA adapters (Hu et al. 2021), DoRA's too (Liu et al. 2024), from PEFT directories.

An adapter's tensors bear the names of the checkpoint's modules. The weight map says where those are in
ours, row by row, so that what the stack fuses or reorders needs no word here.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .adapter_config import AdapterConfig
from .encoder import Encoder
from .errors import CheckpointError
from .layers import Embedding, Linear, Norm
from .loader import CheckpointTensors, SourceWriter
from .spec import Copy, Mxfp4, Source, WeightMap, names_of
from .transformer import Transformer
from .weights import PickleFile, SafetensorsFile, WeightFile

_FILES = (("adapter_model.safetensors", SafetensorsFile), ("adapter_model.bin", PickleFile))
_WRAPPER = re.compile(r"(?:base_model\.model\.)?(.+)")
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<letter>[AB])(?:\.default)?\.(?P<kind>weight|bias)"
    r"|embedding_(?P<table>[AB])(?:\.default)?"
    r"|(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_SAVED = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# With modules_to_save, `bias` "all" saves the biases of those in whose place they are, which nobody computes.
_NOT_COMPUTED = re.compile(r".+\.original_module\.bias")
HEAD = "head"  # of our modules; its matrix may be the embeddings'


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a product: scale * (x W^T + x A^T B^T) in the place of x W^T.

    Attributes:
        a: float32 [rank, in]; of an embedding [rank, vocab].
        b: float32 [out, rank], with the adapter's scaling.
        scale: float32 [out], DoRA's magnitudes over the norms of W + BA; None: 1.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter changes, on the CPU.

    Attributes:
        low_rank: by the name of our module, as "layers.0.qkv", "embed" or "head".
        replaced: whole tensors by the name of our parameter, as "final_norm.weight".
        digest: of the files, in hex.
        rank: the largest of its modules', 0 without low-rank matrices.
    """

    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    digest: str
    rank: int = 0

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        tensors = [*self.replaced.values()]
        for change in self.low_rank.values():
            tensors += [change.a, change.b, *(() if change.scale is None else (change.scale,))]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter is put on: the names, shapes and files of a model's weights.

    It holds no weight, and stays right when the native kernel has taken the model's over.
    """

    checkpoint: Path
    weights: WeightMap
    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, type[nn.Module]]  # by the module's name: Linear, Embedding, Norm
    dtype: torch.dtype

    @classmethod
    def of(cls, model: object) -> AdapterBase:
        """Of a model that `load_model` or `load_encoder` made, or that the native kernel made of one."""
        if isinstance(model, AdapterBase):
            return model
        if not isinstance(model, Transformer | Encoder):
            assert isinstance(model, Packed)
            return model.adapter_base
        if model.checkpoint is None:
            raise ValueError("the model was not loaded from a checkpoint")
        weights = model.spec.weights
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        kinds: dict[str, type[nn.Module]] = {}
        for name, module in model.named_modules():
            for kind in (Linear, Embedding, Norm):
                if isinstance(module, kind):
                    kinds[name] = kind
        sources = weights.expanded(model.spec.num_layers)
        # A matrix that two parts share can be adapted in each by itself.
        if isinstance(model, Transformer) and model.tied_head is not None:
            for name, original in weights.duplicates:
                if sources.get("embed.weight") == Copy(original):
                    sources["head.weight"] = Copy(name)
                    shapes["head.weight"] = shapes["embed.weight"]
                    kinds[HEAD] = Linear
        return cls(model.checkpoint, weights, sources, shapes, kinds, model.dtype)

    @functools.cached_property
    def parts(self) -> dict[str, list[str]]:
        """By the name of the checkpoint's tensor, our parameters that read it."""
        found: dict[str, list[str]] = {}
        for ours, source in self.sources.items():
            for name in dict.fromkeys(names_of(source)):
                found.setdefault(name, []).append(ours)
        return found

    def canonical(self, name: str) -> str:
        """A tensor's name as the weight map has it."""
        name = name.removeprefix(self.weights.optional_prefix)
        for pattern, replacement in self.weights.renames:
            name = re.sub(f"{pattern}$", replacement, name)
        return name


@runtime_checkable
class Packed(Protocol):
    """A model whose weights the native kernel has taken over."""

    @property
    def adapter_base(self) -> AdapterBase: ...


def load_adapter(path: Path, model: object) -> Adapter:
    """The adapter in a PEFT directory, for a model or its `AdapterBase`.

    Raises CheckpointError, naming file and tensor or field, for what is missing, misshaped, of another
    model or not implemented.
    """
    base = AdapterBase.of(model)
    config_path = path / "adapter_config.json"
    config = AdapterConfig(config_path)
    file = _open(path)
    modules, saved = _sorted(file, base)
    if not modules and not saved:
        raise CheckpointError(f"{file.path}: there are no tensors")
    tensors = _AdaptedTensors(base, file, saved)
    reader = _Reader(base, config, file, tensors)
    for name in saved:
        reader.replace(name)
    if missing := [name for name in base.parts if config.is_saved(name) and name not in saved]:
        raise CheckpointError(f"{file.path}: tensor {missing[0]} of modules_to_save is missing")
    for module, found in sorted(modules.items()):
        reader.add(module, found)
    reader.merge_latent()
    digest = hashlib.sha256(config_path.read_bytes() + file.path.read_bytes()).hexdigest()
    return Adapter(reader.low_rank, reader.replaced, digest, max(map(config.rank, modules), default=0))


@dataclass
class _Module:
    """The tensors of a module that has low-rank matrices: the name in the file, by what they are."""

    weight: str  # the base's
    tensors: dict[str, str] = field(default_factory=dict)  # A, B, bias, magnitude
    embedding: bool = False


def _sorted(file: WeightFile, base: AdapterBase) -> tuple[dict[str, _Module], dict[str, str]]:
    """Modules with low-rank matrices, and tensors in the place of the base's: its name to the file's."""
    modules: dict[str, _Module] = {}
    saved: dict[str, str] = {}
    for full_name in file.names:
        wrapped = _WRAPPER.fullmatch(full_name)
        name = full_name if wrapped is None else wrapped[1]
        if match := _LOW_RANK.fullmatch(name):
            module = match["module"]
            kept = modules.setdefault(module, _Module(base.canonical(f"{module}.weight")))
            if match["magnitude"]:
                kind = "magnitude"
            elif match["kind"] == "bias":
                kind = f"bias of {match['letter']}"
            else:
                kind = match["letter"] or match["table"]
                kept.embedding = match["table"] is not None
            kept.tensors[kind] = full_name
        elif _NOT_COMPUTED.fullmatch(name):
            continue
        elif (match := _SAVED.fullmatch(name)) and "lora_" not in name:
            saved[base.canonical(f"{match[1]}.{match[2]}")] = full_name
        else:
            raise CheckpointError(f"{file.path}: tensor {full_name} is not implemented")
    return modules, saved


class _Reader:
    def __init__(
        self, base: AdapterBase, config: AdapterConfig, file: WeightFile, tensors: _AdaptedTensors
    ) -> None:
        self.low_rank: dict[str, LowRank] = {}
        self.replaced: dict[str, Tensor] = {}
        self._base = base
        self._config = config
        self._file = file
        self._tensors = tensors

    def replace(self, name: str) -> None:
        """A tensor of the base, anew. One that nobody trained is the base's own, or refused."""
        full_name = self._tensors.saved[name]
        module, _, kind = name.rpartition(".")
        parts = self._base.parts.get(name, [])
        whole = full_name.removeprefix("base_model.model.")
        trained = self._config.is_saved(whole) or (kind == "bias" and self._config.saves_biases)
        if not parts:
            if trained and self._is_not_read(name):
                return
            raise CheckpointError(f"{self._file.path}: tensor {full_name} is of no part of this model")
        for ours in parts:
            value = self._tensors.adapted(ours)
            if torch.equal(value, self._tensors.original(ours)):
                continue
            if not trained:
                raise CheckpointError(
                    f"{self._file.path}: tensor {full_name} differs from the base's, and {module} is none of "
                    "modules_to_save"
                )
            if ours.rpartition(".")[0] not in self._base.kinds:
                raise CheckpointError(f"{self._file.path}: tensor {full_name} is not implemented")
            self.replaced[ours] = value

    def _is_not_read(self, name: str) -> bool:
        """Whether it is a tensor of the checkpoint that this model does without, as another head's."""
        return any(re.fullmatch(pattern, name) for pattern in self._base.weights.ignored)

    def add(self, module: str, found: _Module) -> None:
        """Low-rank matrices of one of the checkpoint's modules."""
        named = found.tensors.get("A") or found.tensors.get("B") or next(iter(found.tensors.values()))
        if not self._config.is_target(module):
            raise CheckpointError(f"{self._file.path}: tensor {named} is of no module in target_modules")
        if "bias of A" in found.tensors:
            raise CheckpointError(
                f"{self._file.path}: tensor {found.tensors['bias of A']} is not implemented"
            )
        for kind in ("A", "B", *(("magnitude",) if self._config.use_dora else ())):
            if kind not in found.tensors:
                name = (
                    f"{module}.lora_embedding_{kind}" if found.embedding else f"{module}.lora_{kind}.weight"
                )
                if kind == "magnitude":
                    name = f"{module}.lora_magnitude_vector"
                raise CheckpointError(f"{self._file.path}: tensor {name} is missing")
        wanted = Embedding if found.embedding else Linear
        parts = [ours.removesuffix(".weight") for ours in self._base.parts.get(found.weight, [])]
        parts = [layer for layer in parts if self._base.kinds.get(layer) is wanted]
        if not parts:
            raise CheckpointError(f"{self._file.path}: tensor {named} is of no layer of this model")
        for layer in parts:
            self._add(layer, module, found)

    def _add(self, layer: str, module: str, found: _Module) -> None:
        shape = self._base.shapes[f"{layer}.weight"]
        out, width = reversed(shape) if found.embedding else shape
        trace = _RowTrace()
        mine, theirs, size = trace.rows(self._base.sources[f"{layer}.weight"], out, found.weight)
        if found.embedding:
            mine, theirs, size = torch.arange(out), torch.arange(out), out
        rank = self._config.rank(module)
        a = self._read(found.tensors["A"], [rank, width])
        b = torch.zeros(out, rank)
        scaled = self._read(found.tensors["B"], [size, rank]) * self._config.scaling(module)
        b[mine] = scaled[theirs]
        if "bias of B" in found.tensors:
            added = self._read(found.tensors["bias of B"], [size]) * self._config.scaling(module)
            self._add_bias(layer, out, mine, added[theirs])
        scale = None
        if "magnitude" in found.tensors:
            magnitude = self._read(found.tensors["magnitude"], [size])[theirs]
            scale = torch.ones(out)
            norms = self._norms(layer, a, b, found.embedding)[mine]
            scale[mine] = magnitude / norms
        before = self.low_rank.get(layer)
        if before is not None:
            a, b = torch.cat((before.a, a)), torch.cat((before.b, b), dim=1)
            if before.scale is not None:
                scale = before.scale if scale is None else before.scale * scale
        self.low_rank[layer] = LowRank(a, b, scale)

    def _norms(self, layer: str, a: Tensor, b: Tensor, embedding: bool) -> Tensor:
        """float32 [out]: of each output's weights in W + BA."""
        weight = self._tensors.adapted(f"{layer}.weight").float()
        norms: Tensor = torch.linalg.norm((weight.T if embedding else weight) + b @ a, dim=1)
        return norms

    def _add_bias(self, layer: str, out: int, rows: Tensor, added: Tensor) -> None:
        name = f"{layer}.bias"
        bias = self.replaced.get(name)
        if bias is None:
            bias = torch.zeros(out) if name not in self._base.shapes else self._tensors.adapted(name).float()
        bias = bias.clone()
        bias[rows] += added
        self.replaced[name] = bias

    def merge_latent(self) -> None:
        """The latent's matrix is multiplied by heads, so what is added to it is added beforehand."""
        for layer in [name for name in self.low_rank if name.endswith(".latent.up")]:
            change = self.low_rank.pop(layer)
            weight = self._tensors.adapted(f"{layer}.weight").float() + change.b @ change.a
            self.replaced[f"{layer}.weight"] = (
                weight if change.scale is None else weight * change.scale[:, None]
            )

    def _read(self, name: str, shape: list[int]) -> Tensor:
        tensor = self._file.read(name)
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._file.path}: tensor {name} has shape {list(tensor.shape)}, {shape} was expected"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self._file.path}: tensor {name} holds NaN or infinity")
        return tensor.to(torch.float32, copy=True)  # a view of the mapped file would change with it


class _AdaptedTensors(SourceWriter):
    """The base's tensors with those of an adapter in their place."""

    def __init__(self, base: AdapterBase, file: WeightFile, saved: dict[str, str]) -> None:
        self.saved = saved
        self._base = base
        self._file = file
        self._opened: CheckpointTensors | None = None

    @property
    def _original(self) -> CheckpointTensors:
        if self._opened is None:
            self._opened = CheckpointTensors(self._base.checkpoint, self._base.weights)
        return self._opened

    def original(self, ours: str) -> Tensor:
        """A parameter as the base has it, in its dtype."""
        target = torch.empty(self._base.shapes[ours], dtype=self._base.dtype)
        self._original.write(self._source(ours), target)
        return target

    def adapted(self, ours: str) -> Tensor:
        """And as the adapter does."""
        target = torch.empty(self._base.shapes[ours], dtype=self._base.dtype)
        self.write(self._base.sources[ours], target)
        return target

    def _source(self, ours: str) -> Source:
        if ours == f"{HEAD}.weight":  # a tied one may be in no file
            duplicates = dict(self._base.weights.duplicates)
            name = next(iter(names_of(self._base.sources[ours])))
            return Copy(duplicates.get(name, name))
        return self._base.sources[ours]

    def _has(self, name: str) -> bool:
        return name in self.saved or self._original._has(name)

    def _copy(self, name: str, target: Tensor) -> None:
        if name not in self.saved:
            tied = dict(self._base.weights.duplicates)
            self._original._copy(name if self._original._has(name) else tied.get(name, name), target)
            return
        full_name = self.saved[name]
        tensor = self._file.read(full_name)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{self._file.path}: tensor {full_name} has shape {list(tensor.shape)}, "
                f"{list(target.shape)} was expected"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self._file.path}: tensor {full_name} holds NaN or infinity")
        target.copy_(tensor)

    def _unpack(self, source: Mxfp4, target: Tensor) -> None:
        self._original._unpack(source, target)


class _RowTrace(SourceWriter):
    """Follows rows through a source, in place of values: which row of which tensor each of ours is."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}  # by name: the number of its first row, and how many

    def rows(self, source: Source, out: int, name: str) -> tuple[Tensor, Tensor, int]:
        """Of a matrix of `out` rows: those that come from tensor `name`, which of its they are, its rows."""
        numbers = torch.full((out, 1), -1, dtype=torch.int64)
        self.write(source, numbers)
        first, size = self._sizes[name]
        own = numbers.flatten() - first
        mine = ((own >= 0) & (own < size)).nonzero().flatten()
        return mine, own[mine], size

    def _has(self, name: str) -> bool:
        return True

    def _copy(self, name: str, target: Tensor) -> None:
        begin = sum(size for _, size in self._sizes.values())
        first, size = self._sizes.setdefault(name, (begin, target.numel()))
        target.copy_(torch.arange(first, first + size).view(target.shape))

    def _unpack(self, source: Mxfp4, target: Tensor) -> None:
        raise TypeError("packed matrices are of experts, which have no adapters")


def _open(path: Path) -> WeightFile:
    for name, kind in _FILES:
        if (path / name).is_file():
            return kind(path / name)
    raise CheckpointError(f"{path}: neither {' nor '.join(name for name, _ in _FILES)}")
