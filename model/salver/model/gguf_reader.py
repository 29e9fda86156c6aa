"""Reads the header of a GGUF file with every length checked, and its tensors lazily.

The `gguf` package has a reader too, but it slices past the end of a truncated file
without noticing and keeps an array object per string; tensors are still dequantized by
`gguf.dequantize`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .errors import CheckpointError

FloatArray = npt.NDArray[np.float32]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_CHUNK_ELEMENTS = 1 << 22
_PLAIN_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header declares it. `shape` in numpy order (rows first), `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """The metadata (`fields`) and tensor table (`tensors`) of a GGUF file of version 2 or 3.

    Raises CheckpointError, naming the file and the field, where the file is damaged,
    truncated or of a kind that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot read it: {error}") from error
        self._at = 0
        self._what = "the header"
        self._read()

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._map):
            raise self._fail(
                f"truncated or damaged: {self._what} runs to byte {end} of a file of {len(self._map)} bytes"
            )
        taken = self._map[self._at : end]
        self._at = end
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{self._what} is not UTF-8: {error}") from error

    def _value(self, kind: int, *, nested: bool = False) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and not nested:
            item, count = self._scalar("I"), self._scalar("Q")
            if item in _SCALARS:
                code = _SCALARS[item]
                raw = self._take(count * struct.calcsize("<" + code))
                return list(struct.unpack(f"<{count}{code}", raw))
            return [self._value(item, nested=True) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._fail(f"{self._what} has value type {kind}, which is not implemented")
        return self._scalar(_SCALARS[kind])

    def _read(self) -> None:
        if self._take(4) != b"GGUF":
            raise self._fail("not a GGUF file (its first four bytes are not 'GGUF')")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._fail(f"GGUF version {version} is not implemented (2 and 3 are, little-endian)")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_fields):
            self._what = "the name of a metadata field"
            name = self._string()
            self._what = f"metadata field {name}"
            if name in self.fields:
                raise self._fail(f"{self._what} occurs twice")
            self.fields[name] = self._value(self._scalar("I"))
        relative = [self._tensor() for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._fail(f"general.alignment is {alignment!r}, not a positive number")
        start = -(-self._at // alignment) * alignment
        for tensor in relative:
            end = start + tensor.offset + tensor.num_bytes
            if end > len(self._map):
                raise self._fail(
                    f"truncated: tensor {tensor.name} runs to byte {end} of a file of {len(self._map)} bytes"
                )
            if tensor.name in self.tensors:
                raise self._fail(f"tensor {tensor.name} occurs twice")
            self.tensors[tensor.name] = TensorInfo(
                tensor.name, tensor.shape, tensor.type, start + tensor.offset, tensor.num_bytes
            )

    def _tensor(self) -> TensorInfo:
        self._what = "the name of a tensor"
        name = self._string()
        self._what = f"the description of tensor {name}"
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._fail(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dimensions)]))
        code = self._scalar("I")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise self._fail(f"tensor {name} has type {code}, which is not implemented") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._fail(
                f"tensor {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}"
            )
        elements = 1
        for size in shape:
            elements *= size
        return TensorInfo(name, shape, kind, self._scalar("Q"), elements // block * block_bytes)

    def rows(self, tensor: TensorInfo, row_group: int = 1) -> Iterator[FloatArray]:
        """Yield `tensor` in float32, some whole groups of `row_group` rows at a time.

        A vector is yielded whole. Raises CheckpointError for a type that `gguf` cannot dequantize.
        """
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        row_elements = tensor.shape[-1]
        step = max(1, _CHUNK_ELEMENTS // (row_elements * row_group)) * row_group
        row_bytes = tensor.num_bytes // max(1, num_rows)
        if len(tensor.shape) > 2:
            raise self._fail(f"tensor {tensor.name} has {len(tensor.shape)} dimensions; 1 or 2 were expected")
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            raw = np.frombuffer(self._map, np.uint8, count * row_bytes, tensor.offset + first * row_bytes)
            plain = _PLAIN_TYPES.get(tensor.type.name)
            if plain is not None:
                values = raw.view(plain).astype(np.float32).reshape(count, row_elements)
            else:
                try:
                    values = dequantize(raw.reshape(count, row_bytes), tensor.type)
                except NotImplementedError as error:
                    raise self._fail(
                        f"tensor {tensor.name} is of type {tensor.type.name}, which is not implemented"
                    ) from error
            yield values.reshape(tensor.shape) if len(tensor.shape) == 1 else values
