"""Reads LoRA adapters (Hu et al. 2021), DoRA's too (Liu et al. 2024), from PEFT directories.

An adapter's tensors bear the names of the checkpoint's modules. The weight map says where those are in
ours, row by row, so that what the stack fuses or reorders needs no word here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapter_base import HEAD, SHARED, AdapterBase
from .adapter_config import AdapterConfig
from .adapter_experts import PARAMETERS, ExpertMatrices
from .adapter_tensors import AdaptedTensors, RowTrace
from .disentangled import DistanceProduct
from .errors import CheckpointError
from .experts import ExpertProducts
from .layers import Embedding, Linear, Norm
from .spec import Taps, names_of
from .weights import PickleFile, SafetensorsFile, WeightFile

_FILES = (("adapter_model.safetensors", SafetensorsFile), ("adapter_model.bin", PickleFile))
_WRAPPER = re.compile(r"(?:base_model\.model\.)?(.+)")
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<letter>[AB])(?:\.default)?\.(?P<kind>weight|bias)"
    r"|embedding_(?P<table>[AB])(?:\.default)?"
    r"|(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_SAVED = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_WRAPPED = ".base_layer"  # of a module whose parameters are adapted one by one
# With modules_to_save, `bias` "all" saves the biases of those in whose place they are, which nobody computes.
_NOT_COMPUTED = re.compile(r".+\.original_module\.bias")


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a product: scale * (x W^T + x A^T B^T) in the place of x W^T.

    Attributes:
        a: float32 [rank, in]; of an embedding [rank, vocab], of experts [experts, rank, in].
        b: float32 [out, rank], with the adapter's scaling; of experts [experts, out, rank].
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


def files_of(path: Path) -> list[Path]:
    """The files with an adapter's tensors that are in its directory; the first one is read."""
    return [path / name for name, _ in _FILES if (path / name).is_file()]


def load_adapter(path: Path, model: object, max_rank: int | None = None) -> Adapter:
    """The adapter in a PEFT directory, for a model or its `AdapterBase`.

    Raises CheckpointError, naming file and tensor or field, for what is missing, misshaped, of another
    model, of a rank above `max_rank` or not implemented.
    """
    base = AdapterBase.of(model)
    config_path = path / "adapter_config.json"
    config = AdapterConfig(config_path)
    file = _open(path)
    modules, saved, tokens = _sorted(file, base)
    if not modules and not saved and not tokens:
        raise CheckpointError(f"{file.path}: there are no tensors")
    reader = _Reader(base, config, file, AdaptedTensors(base, file, saved), max_rank)
    for name in saved:
        reader.replace(name)
    if missing := [name for name in base.parts if config.is_saved(name) and name not in saved]:
        raise CheckpointError(f"{file.path}: tensor {missing[0]} of modules_to_save is missing")
    for module, found in sorted(modules.items()):
        reader.add(module, found)
    reader.check_complete(modules)
    reader.merge_latent()
    reader.put_experts()
    reader.add_tokens(tokens)
    digest = hashlib.sha256(config_path.read_bytes() + file.path.read_bytes()).hexdigest()
    return Adapter(reader.low_rank, reader.replaced, digest, reader.rank)


@dataclass
class _Module:
    """The tensors of a module that has low-rank matrices: the name in the file, by what they are."""

    tensors: dict[str, str] = field(default_factory=dict)  # A, B, bias, magnitude
    embedding: bool = False


def _sorted(file: WeightFile, base: AdapterBase) -> tuple[dict[str, _Module], dict[str, str], dict[str, str]]:
    """What is in the file.

    Modules with low-rank matrices; tensors in the place of the base's, its name to the file's; and modules
    whose rows of some tokens are there, to the tensor of them.
    """
    modules: dict[str, _Module] = {}
    saved: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for full_name in file.names:
        wrapped = _WRAPPER.fullmatch(full_name)
        name = full_name if wrapped is None else wrapped[1]
        if match := _LOW_RANK.fullmatch(name):
            kept = modules.setdefault(match["module"], _Module())
            if match["magnitude"]:
                kind = "magnitude"
            elif match["kind"] == "bias":
                kind = f"bias of {match['letter']}"
            else:
                kind = match["letter"] or match["table"]
                kept.embedding = match["table"] is not None
            kept.tensors[kind] = full_name
        elif match := _TOKENS.fullmatch(name):
            tokens[match[1]] = full_name
        elif _NOT_COMPUTED.fullmatch(name):
            continue
        elif (match := _SAVED.fullmatch(name)) and "lora_" not in name:
            saved[base.canonical(f"{match[1]}.{match[2]}")] = full_name
        else:
            raise CheckpointError(f"{file.path}: tensor {full_name} is not implemented")
    return modules, saved, tokens


class _Reader:
    def __init__(
        self,
        base: AdapterBase,
        config: AdapterConfig,
        file: WeightFile,
        tensors: AdaptedTensors,
        max_rank: int | None,
    ) -> None:
        self.low_rank: dict[str, LowRank] = {}
        self.replaced: dict[str, Tensor] = {}
        self.rank = 0
        self._experts = ExpertMatrices(base)
        self._base = base
        self._config = config
        self._file = file
        self._tensors = tensors
        self._max_rank = max_rank

    def replace(self, name: str) -> None:
        """A tensor of the base, anew. One that nobody trained is the base's own, or refused."""
        full_name = self._tensors.saved[name]
        module, _, kind = name.rpartition(".")
        parts = self._base.parts.get(name, [])
        parts = [ours for ours in parts if name in names_of(self._base.sources[ours])]
        whole = full_name.removeprefix("base_model.model.")
        trained = self._config.is_saved(whole) or (kind == "bias" and self._config.saves_biases)
        if not parts:
            if trained and self._is_not_read(name):
                return
            raise self._error(f"tensor {full_name} is of no part of this model")
        for ours in parts:
            value = self._tensors.adapted(ours)
            if torch.equal(value, self._tensors.original(ours)):
                continue
            if not trained:
                raise self._error(
                    f"tensor {full_name} differs from the base's, and {module} is none of modules_to_save"
                )
            if ours.rpartition(".")[0] not in self._base.kinds:
                raise self._error(f"tensor {full_name} is not implemented")
            self.replaced[ours] = value

    def _is_not_read(self, name: str) -> bool:
        """Whether it is a tensor of the checkpoint that this model does without, as another head's."""
        return any(re.fullmatch(pattern, name) for pattern in self._base.weights.ignored)

    def add(self, module: str, found: _Module) -> None:
        """Low-rank matrices of one of the checkpoint's modules, or of one of its parameters."""
        named = found.tensors.get("A") or found.tensors.get("B") or next(iter(found.tensors.values()))
        whole = module
        while whole.endswith(_WRAPPED):
            whole = whole.removesuffix(_WRAPPED)
        # Those of several parameters stand around one another, the last of them outermost.
        order = PARAMETERS if whole.endswith("experts") else ("weight", "bias")
        targets = [name for name in order if self._config.is_parameter(f"{whole}.{name}")]
        depth = (len(module) - len(whole)) // len(_WRAPPED)
        if depth >= len(targets) and (depth or not self._config.is_target(whole)):
            raise self._error(f"tensor {named} is of no module in target_modules")
        key = f"{whole}.{targets[-1 - depth]}" if targets else whole
        if targets and key.endswith("bias"):
            raise self._error(f"tensor {named} is of {key}, which is not implemented")
        if "bias of A" in found.tensors:
            raise self._error(f"tensor {found.tensors['bias of A']} is not implemented")
        for kind in ("A", "B", *(("magnitude",) if self._config.use_dora else ())):
            if kind not in found.tensors:
                name = (
                    f"{module}.lora_embedding_{kind}" if found.embedding else f"{module}.lora_{kind}.weight"
                )
                if kind == "magnitude":
                    name = f"{module}.lora_magnitude_vector"
                raise self._error(f"tensor {name} is missing")
        self.rank = max(self.rank, self._config.rank(key))
        if self._max_rank is not None and self.rank > self._max_rank:
            raise self._error(
                f"tensor {named} is of rank {self.rank}, and at most {self._max_rank} is served "
                "(--max-adapter-rank)"
            )
        layer = self._experts.layer_of(whole, key.removeprefix(f"{whole}."))
        if layer is not None:
            self._add_all_experts(layer, key, found)
            return
        weight = self._base.canonical(f"{whole}.weight")
        parts = [ours.removesuffix(".weight") for ours in self._base.parts.get(weight, [])]
        wanted = (Embedding,) if found.embedding else (Linear, ExpertProducts, DistanceProduct)
        parts = [layer for layer in parts if self._is_product(layer, wanted)]
        if not parts:
            raise self._error(f"tensor {named} is of no layer of this model")
        for layer in parts:
            if self._base.kinds[layer] is ExpertProducts:
                self._add_expert(layer, key, weight, found)
            else:
                self._add(layer, key, weight, found)

    def check_complete(self, modules: Iterable[str]) -> None:
        """Raises CheckpointError if a module that should have low-rank matrices has none.

        That is one whose like in another layer has some, or all that a listed name means.
        """
        found = {self._base.canonical(f"{module}.weight").removesuffix(".weight") for module in modules}
        kinds = {_NUMBER.sub(".*", module) for module in found}
        missed = set(self._config.target_names)
        missed -= {name for name in missed for module in modules if f".{module}".endswith(f".{name}")}
        for part, ours in self._base.parts.items():
            module = part.removesuffix(".weight")
            if module in found or not part.endswith(".weight") or self._config.is_saved(module):
                continue
            kind = self._base.kinds.get(ours[0].removesuffix(".weight"))
            if kind is None or issubclass(kind, Norm):
                continue
            named = any(
                f".{name}".endswith(end) for name in (module, part) for end in map(".{}".format, missed)
            )
            alike = _NUMBER.sub(".*", module) in kinds
            if (alike or named) and (self._config.is_target(module) or self._config.is_parameter(part)):
                raise self._error(f"tensor {module}.lora_A.weight is missing")

    def _is_product(self, layer: str, wanted: tuple[type[nn.Module], ...]) -> bool:
        # A convolution's inputs are not those of its adapter.
        source = self._base.sources[f"{layer}.weight"]
        return self._base.kinds.get(layer) in wanted and not isinstance(source, Taps)

    def _add_all_experts(self, layer: str, key: str, found: _Module) -> None:
        self._refuse_of_experts(found)
        experts, out, width = self._experts.shape(layer)
        rank = experts * self._config.rank(key)
        a = self._read(found.tensors["A"], [rank, width])
        self._experts.put_all(
            layer, a, self._read(found.tensors["B"], [out, rank]) * self._config.scaling(key)
        )

    def _add_expert(self, layer: str, key: str, weight: str, found: _Module) -> None:
        self._refuse_of_experts(found)
        _, out, width = self._experts.shape(layer)
        rank = self._config.rank(key)
        expert, mine, theirs, size = self._experts.rows(layer, weight)
        b = torch.zeros(out, rank)
        b[mine] = (self._read(found.tensors["B"], [size, rank]) * self._config.scaling(key))[theirs]
        self._experts.put(layer, expert, self._read(found.tensors["A"], [rank, width]), b)

    def _refuse_of_experts(self, found: _Module) -> None:
        for kind in ("magnitude", "bias of B"):
            if kind in found.tensors:
                raise self._error(f"tensor {found.tensors[kind]} of experts is not implemented")

    def put_experts(self) -> None:
        """What was added of experts, each layer's together."""
        self.low_rank |= {layer: LowRank(a, b) for layer, (a, b) in self._experts.stacked().items()}

    def _add(self, layer: str, key: str, weight: str, found: _Module) -> None:
        shape = self._base.shapes[f"{layer}.weight"]
        out, width = reversed(shape) if found.embedding else shape
        mine, theirs, size = RowTrace().rows(self._base.source(f"{layer}.weight", weight), out, weight)
        if found.embedding:
            mine, theirs, size = torch.arange(out), torch.arange(out), out
        rank = self._config.rank(key)
        a = self._read(found.tensors["A"], [rank, width])
        b = torch.zeros(out, rank)
        scaled = self._read(found.tensors["B"], [size, rank]) * self._config.scaling(key)
        b[mine] = scaled[theirs]
        if "bias of B" in found.tensors:
            added = self._read(found.tensors["bias of B"], [size]) * self._config.scaling(key)
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

    def add_tokens(self, tokens: dict[str, str]) -> None:
        """Rows of some tokens, anew: as low-rank matrices, whose rank is the number of tokens."""
        own = {module: self._token_layers(module, full_name) for module, full_name in tokens.items()}
        found = {layer for layers in own.values() for layer in layers}
        for name in self._config.token_modules:
            ends = [part for part in self._base.parts if f".{part}".endswith(f".{name}.weight")]
            layers = {ours.removesuffix(".weight") for part in ends for ours in self._base.parts[part]}
            if not layers & found and not any(f".{module}".endswith(f".{name}") for module in tokens):
                raise self._error(f"tensor {name}.token_adapter.trainable_tokens_delta is missing")
        if self._config.trains_tokens and not tokens:
            raise self._error("tensor trainable_tokens_delta is missing")
        for module, them in own.items():
            indices = self._config.token_indices(module)
            if indices is None:
                raise self._error(f"tensor {tokens[module]} is of no module in trainable_token_indices")
            # A matrix that the head shares is changed there too, unless the head has tokens of its own.
            others = {layer for other, theirs in own.items() if other != module for layer in theirs[:1]}
            for number, layer in enumerate(them):
                if number == 0 or layer not in others:
                    self._put_tokens(layer, tokens[module], indices)

    def _token_layers(self, module: str, full_name: str) -> list[str]:
        """Our modules that read the rows of one of theirs; what it shares with others comes first."""
        parts = self._base.parts.get(self._base.canonical(f"{module}.weight"), [])
        layers = [ours.removesuffix(".weight") for ours in parts]
        if layers == [SHARED] and HEAD in self._base.tied:
            return list(self._base.tied)
        if layers == ["embed"] and not self._base.has_shared:
            return list(self._base.tied)
        if not all(self._base.kinds.get(layer) in (Embedding, Linear) for layer in layers) or not layers:
            raise self._error(f"tensor {full_name} is of no embedding of this model")
        return layers

    def _put_tokens(self, layer: str, full_name: str, indices: list[int]) -> None:
        vocab, width = self._base.shapes[f"{layer}.weight"]
        if bad := [token for token in indices if token >= vocab]:
            raise self._config.error(f"trainable_token_indices has {bad[0]}, and there are {vocab} tokens")
        if layer in self.low_rank or f"{layer}.bias" in self._base.shapes:
            raise self._error(f"tensor {full_name} of {layer} is not implemented")
        rows = self._read(full_name, [len(indices), width])
        change = rows - self._tensors.original(f"{layer}.weight")[indices].float()
        chosen = torch.zeros(len(indices), vocab)
        chosen[range(len(indices)), indices] = 1.0
        if self._base.kinds[layer] is Embedding:
            self.low_rank[layer] = LowRank(chosen, change.T.contiguous())
        else:
            self.low_rank[layer] = LowRank(change, chosen.T.contiguous())
        self.rank = max(self.rank, len(indices))

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
        # What comes after the head multiplies the bias too; before it, it would not.
        bias[rows] += added / self._base.head_multiplier if layer == HEAD else added
        self.replaced[name] = bias

    def merge_latent(self) -> None:
        """The latent's matrix is multiplied by heads, so what is added to it is added beforehand."""
        for layer in [name for name in self.low_rank if name.endswith(".latent.up")]:
            change = self.low_rank.pop(layer)
            weight = self._tensors.adapted(f"{layer}.weight").float() + change.b @ change.a
            self.replaced[f"{layer}.weight"] = (
                weight if change.scale is None else weight * change.scale[:, None]
            )

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {text}")

    def _read(self, name: str, shape: list[int]) -> Tensor:
        tensor = self._file.read(name)
        if list(tensor.shape) != shape:
            raise self._error(f"tensor {name} has shape {list(tensor.shape)}, {shape} was expected")
        if not bool(tensor.isfinite().all()):
            raise self._error(f"tensor {name} holds NaN or infinity")
        return tensor.to(torch.float32, copy=True)  # a view of the mapped file would change with it


def _open(path: Path) -> WeightFile:
    for name, kind in _FILES:
        if (path / name).is_file():
            return kind(path / name)
    raise CheckpointError(f"{path}: neither {' nor '.join(name for name, _ in _FILES)}")
