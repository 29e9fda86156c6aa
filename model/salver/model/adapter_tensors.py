"""The tensors of an adapted model, and where the rows of the checkpoint's are in ours."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter_base import AdapterBase
from .errors import CheckpointError
from .loader import CheckpointTensors, SourceWriter
from .spec import Mxfp4, Source
from .weights import WeightFile


class AdaptedTensors(SourceWriter):
    """The base's tensors with those of an adapter in their place."""

    def __init__(self, base: AdapterBase, file: WeightFile, saved: dict[str, str]) -> None:
        """`saved`: of tensors of the base, under which name the adapter's file has them."""
        self.saved = saved
        self._base = base
        self._file = file
        self._opened: CheckpointTensors | None = None
        self._only_original = False

    @property
    def _original(self) -> CheckpointTensors:
        if self._opened is None:
            self._opened = CheckpointTensors(self._base.checkpoint, self._base.weights)
        return self._opened

    def original(self, ours: str) -> Tensor:
        """A parameter as the base has it, in its dtype."""
        self._only_original = True
        try:
            return self.adapted(ours)
        finally:
            self._only_original = False

    def adapted(self, ours: str) -> Tensor:
        """And as the adapter does."""
        target = torch.empty(self._base.shapes[ours], dtype=self._base.dtype)
        self.write(self._base.sources[ours], target)
        return target

    def _is_saved(self, name: str) -> bool:
        return name in self.saved and not self._only_original

    def _has(self, name: str) -> bool:
        return self._is_saved(name) or self._original._has(name)

    def _copy(self, name: str, target: Tensor) -> None:
        if not self._is_saved(name):
            if name in self._base.stand_ins and not self._original._has(name):
                self._original.write(self._base.stand_ins[name], target)
            else:
                self._original._copy(name, target)
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


class RowTrace(SourceWriter):
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

    def order(self, source: Source, experts: int, out: int) -> Tensor:
        """int64 [out]: of a stack of matrices that is one tensor, which of its rows each of ours is."""
        numbers = torch.full((experts, out, 1), -1, dtype=torch.int64)
        self.write(source, numbers)
        return numbers[0].flatten()

    def _has(self, name: str) -> bool:
        return True

    def _copy(self, name: str, target: Tensor) -> None:
        begin = sum(size for _, size in self._sizes.values())
        first, size = self._sizes.setdefault(name, (begin, target.numel()))
        target.copy_(torch.arange(first, first + size).view(target.shape))

    def _unpack(self, source: Mxfp4, target: Tensor) -> None:
        self._copy(source.blocks, target)
