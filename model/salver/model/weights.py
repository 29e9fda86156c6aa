"""Reads the tensors of a checkpoint one by one, from safetensors or PyTorch files, whole or sharded."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config_reader import read_json
from .errors import CheckpointError

# Touched pages of a mapped file count as this process's memory until the file is closed.
REOPEN_BYTES = 64 << 20
_FORMATS = (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin"))


class WeightFile(Protocol):
    """One file of tensors."""

    path: Path
    names: tuple[str, ...]

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; perhaps a view of the mapped file."""
        ...


class SafetensorsFile:
    """Raises CheckpointError, naming the file, when it is damaged or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched = 0
        self._open()
        self.names = tuple(self._file.keys())

    def _open(self) -> None:
        try:
            self._file: Any = safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: damaged or cut short: {error}") from error

    def read(self, name: str) -> Tensor:
        if self._touched > REOPEN_BYTES:
            self._touched = 0
            self._open()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        self._touched += tensor.nbytes
        return tensor


class PickleFile:
    """A `torch.save` file, read without running code from it (`weights_only`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: damaged, cut short or not plain tensors: {error}") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path}: a dictionary of tensors was expected")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {name} is not a tensor")
        self._tensors: dict[str, Tensor] = loaded
        self.names = tuple(loaded)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_weights(checkpoint: Path) -> dict[str, WeightFile]:
    """Tensor name to the file that holds it.

    Of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
    pytorch_model.bin.index.json, the first that is there; else of an ONNX file. Raises CheckpointError.
    """
    for name, kind in _FORMATS:
        path, index_path = checkpoint / name, checkpoint / f"{name}.index.json"
        if path.is_file():
            files = [_open(path, kind)]
            expected = None
        elif index_path.is_file():
            expected = _weight_map(index_path)
            files = [_open(checkpoint / part, kind) for part in sorted(set(expected.values()))]
        else:
            continue
        found: dict[str, WeightFile] = {}
        for file in files:
            for tensor in file.names:
                if tensor in found:
                    raise CheckpointError(f"{tensor} is in {found[tensor].path} and in {file.path}")
                found[tensor] = file
        for tensor, part in (expected or {}).items():
            if tensor not in found or found[tensor].path.name != part:
                raise CheckpointError(
                    f"{checkpoint / part}: {tensor} is missing, which {index_path} says is there"
                )
        return found
    # Not before it is wanted: the others do without protobuf.
    from .onnx_weights import OnnxFile, onnx_file

    exported = onnx_file(checkpoint)
    if exported is not None:
        onnx = OnnxFile(exported)
        return dict.fromkeys(onnx.names, onnx)
    names = ", ".join(name for name, _ in _FORMATS)
    raise CheckpointError(f"{checkpoint}: none of {names}, nor an index of their parts, nor an ONNX file")


def _open(path: Path, kind: str) -> WeightFile:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    return SafetensorsFile(path) if kind == "safetensors" else PickleFile(path)


def _weight_map(index_path: Path) -> dict[str, str]:
    """Tensor name to file name. File names are plain: an index leads nowhere outside its folder."""
    entries = read_json(index_path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index_path}: weight_map is missing")
    for tensor, part in entries.items():
        if not isinstance(part, str) or Path(part).name != part:
            raise CheckpointError(f"{index_path}: weight_map: {tensor} is in {part!r}, which is no file name")
    return entries
