"""From a checkpoint directory to a `Transformer`: strict, streamed, memory-mapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from salver.model.attention import choose
from salver.model.config_reader import read_json, read_spec
from salver.model.errors import CheckpointError
from salver.model.spec import Cat, Copy, Source, Transpose, WeightMap
from salver.model.transformer import Transformer


def load_model(
    checkpoint: Path, *, device: torch.device, dtype: torch.dtype, numerics: str = "exact"
) -> Transformer:
    """Builds the model on the meta device, then gives it one tensor after the other.

    Raises CheckpointError naming the file, field or tensor: anything unsupported, missing, unused,
    misshaped or cut short.
    """
    spec = read_spec(checkpoint)
    with torch.device("meta"):
        model = Transformer(spec, choose(dtype, numerics))
    with ExitStack() as stack:
        store = TensorStore(checkpoint, spec.weights, stack)
        for name, parameter in list(model.named_parameters()):
            source, layer = _source(spec.weights, name)
            tensor = store.read(source, layer)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint}: {_describe(source, layer)} has shape {list(tensor.shape)}, "
                    f"but config.json asks for {list(parameter.shape)}"
                )
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{checkpoint}: {_describe(source, layer)} is {tensor.dtype}, not floats"
                )
            _assign(model, name, tensor.to(device=device, dtype=dtype).contiguous())
        store.refuse_unused()
    return model.eval()


class TensorStore:
    """The checkpoint's tensors by name, from safetensors or PyTorch files, whole or sharded."""

    def __init__(self, checkpoint: Path, weights: WeightMap, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._readers: dict[str, tuple[Path, Callable[[str], Tensor]]] = {}
        self._read: set[str] = set()
        for path in _weight_files(checkpoint):
            for name, reader in _open(path, stack):
                if name in self._readers:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._readers[name][0].name}")
                self._readers[name] = (path, reader)
        prefix = weights.optional_prefix
        self._strip = prefix if prefix and not any(n.startswith(prefix) for n in self._readers) else ""

    def read(self, source: Source, layer: int) -> Tensor:
        """Evaluates a source. The result may be a view of the mapped file."""
        match source:
            case Copy(name):
                return self._tensor(name.format(layer=layer))
            case Transpose(inner):
                return self.read(inner, layer).t()
            case Cat(parts):
                return torch.cat([self.read(part, layer) for part in parts])

    def refuse_unused(self) -> None:
        """Raises CheckpointError for a tensor that the model has no place for."""
        prefix = self._weights.optional_prefix if self._strip else ""
        for name in sorted(set(self._readers) - self._read):
            full = name if name.startswith("lm_head") else prefix + name
            if not any(re.fullmatch(pattern, full) for pattern in self._weights.ignored):
                raise CheckpointError(f"{self._readers[name][0]}: tensor {name} has no place in the model")

    def _tensor(self, name: str) -> Tensor:
        name = name.removeprefix(self._strip)
        if name not in self._readers:
            raise CheckpointError(f"{self._checkpoint}: tensor {name} is missing")
        path, reader = self._readers[name]
        self._read.add(name)
        try:
            return reader(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error


def _weight_files(checkpoint: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = checkpoint / f"{single}.index.json"
        if index.exists():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict):
                raise CheckpointError(f"{index}: weight_map is missing")
            files = [checkpoint / name for name in sorted({str(file) for file in table.values()})]
            for file in files:
                if file.parent != checkpoint:
                    raise CheckpointError(f"{index}: {file.name} lies outside the checkpoint")
                if not file.exists():
                    raise CheckpointError(f"{file} is missing ({index.name} names it)")
            return files
        if (checkpoint / single).exists():
            return [checkpoint / single]
    raise CheckpointError(f"{checkpoint} holds no weights: neither model.safetensors nor pytorch_model.bin")


def _open(path: Path, stack: ExitStack) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
    try:
        if path.suffix == ".safetensors":
            opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor
        else:
            # weights_only: a pickle that would run code is refused.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    yield name, tensors.__getitem__
    except CheckpointError:
        raise
    except Exception as error:  # each format has its own kinds; all mean that the file is no good
        raise CheckpointError(f"{path} cannot be read (cut short?): {error}") from error


def _source(weights: WeightMap, name: str) -> tuple[Source, int]:
    """The source of one of our tensors, and its layer's number."""
    found = re.match(r"layers\.(\d+)\.", name)
    if found is None:
        return weights.tensors[name], 0
    return weights.tensors[name.replace(found.group(0), "layers.{layer}.", 1)], int(found.group(1))


def _describe(source: Source, layer: int) -> str:
    match source:
        case Copy(name):
            return f"tensor {name.format(layer=layer)}"
        case Transpose(inner):
            return _describe(inner, layer)
        case Cat(parts):
            return " + ".join(_describe(part, layer) for part in parts)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
