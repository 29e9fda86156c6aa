"""The kernel's C interface: its structures, and calls with tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import KernelUnavailable

VERSION = 7
PANEL = 32  # columns of a packed panel
LANES = 16
TILE = 64  # keys of a tile of attention
BLOCK_SIZE = 16  # tokens of a cache block: the sixteen lanes of a register
MAX_HEAD_DIM = 256
MAX_WIDTH = 32768
INT4_BLOCK = 32  # weights of a column that share a scale and a least value
INT4_BYTES = 20  # of such a block: 32 values of 4 bits, two numbers of 16

Progress = ctypes.CFUNCTYPE(None)


class Precision(IntEnum):
    """Of weights and of what is multiplied with them."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3

    @property
    def activations(self) -> torch.dtype:
        return (torch.float32, torch.bfloat16, torch.int8, torch.int8)[self]

    @property
    def weights(self) -> torch.dtype:
        return (torch.float32, torch.bfloat16, torch.uint8, torch.uint8)[self]

    @property
    def rounds_activations(self) -> bool:
        """Products read int8 rows, which need all of a row of floats first."""
        return self.activations is torch.int8

    @property
    def head(self) -> Precision:
        """Of the matrix that gives the logits: 4 bits there would cost the most quality."""
        return Precision.INT8 if self is Precision.INT4 else self


class Kind(IntEnum):
    """Operations of a program."""

    EMBED = 0
    RMS_NORM = 1
    LAYER_NORM = 2
    MULTIPLY = 3
    ROTATE_AND_STORE = 4
    ATTEND = 5
    QUANTIZE = 6
    PROGRESS = 7
    ADD_SEGMENTS = 8
    ROTATE = 9
    ATTEND_WHOLE = 10
    ATTEND_SOURCE = 11
    SHRINK = 12


class Epilogue(IntEnum):
    """What becomes of a product."""

    STORE = 0
    ADD = 1
    ACTIVATE = 2
    GATED = 3


ACTIVATIONS = {
    "silu": 1,
    "swish": 1,
    "gelu": 2,
    "gelu_python": 2,
    "gelu_new": 3,
    "gelu_fast": 3,
    "gelu_pytorch_tanh": 3,
    "relu": 4,
}


class CBuffer(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("precision", c_int32),
        ("width", c_int32),
        ("group_scale", c_void_p),
        ("row_offset", c_void_p),
        ("scale_stride", c_int64),
        ("group", c_int32),
        ("group_sum", c_void_p),
    )


class CWeight(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("column_scale", c_void_p),
        ("precision", c_int32),
        ("rows", c_int32),
        ("depth", c_int32),
        ("panels", c_int32),
    )


class COperation(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("layer", c_int32),
        ("in_", c_int32),
        ("out", c_int32),
        ("weight", c_int32),
        ("extra", c_int32),
        ("window", c_int32),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("epsilon", c_float),
        ("adapted", c_int32),
    )


class CAdapted(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("ranks", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("rank", c_int32),
    )


class CCache(ctypes.Structure):
    _fields_ = (
        ("keys_and_values", c_void_p),
        ("blocks", c_int64),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("scale", c_float),
    )


class CProgram(ctypes.Structure):
    _fields_ = (
        ("operations", POINTER(COperation)),
        ("num_operations", c_int32),
        ("cache_precision", c_int32),
        ("pairs", c_int32),
        ("buffers", POINTER(CBuffer)),
        ("weights", POINTER(CWeight)),
        ("cache", CCache),
        ("adapted", POINTER(CAdapted)),
        ("num_adapters", c_int32),
        ("shrunk", c_void_p),
        ("shrunk_stride", c_int64),
    )


class CStep(ctypes.Structure):
    _fields_ = (
        ("num_rows", c_int32),
        ("num_sequences", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("segments", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("lengths", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("local_cos", c_void_p),
        ("local_sin", c_void_p),
        ("source", c_void_p),
        ("adapters", c_void_p),
    )


class Library:
    """The loaded library, on the threads that torch's own operations use."""

    def __init__(self, path: Path) -> None:
        """Raises KernelUnavailable."""
        try:
            self._library: Any = ctypes.CDLL(str(path))
            version = self._library.salver_version()
        except (OSError, AttributeError) as error:
            raise KernelUnavailable(f"{path} cannot be loaded: {error}") from error
        if version != VERSION:
            raise KernelUnavailable(f"{path} is version {version}, not {VERSION}")
        self._library.salver_use_threads_of(_gomp_parallel())

    def run(self, program: CProgram, step: CStep, threads: int, on_progress: Any) -> None:
        self._library.salver_run(ctypes.byref(program), ctypes.byref(step), threads, on_progress)

    def multiply(
        self,
        rows: CBuffer,
        weight: CWeight,
        out: Tensor,
        threads: int,
        adapted: ctypes.Array[CAdapted] | None = None,
        numbers: Tensor | None = None,
        shrunk: Tensor | None = None,
    ) -> None:
        """out, float32 [R, weight.rows], of the first R rows of a buffer.

        `numbers`, int32 [R], says which of `adapted` changes each row, -1 for none; `shrunk` is their room.
        """
        room = (None, 0) if shrunk is None else (c_void_p(shrunk.data_ptr()), c_int64(shrunk.stride(0)))
        self._library.salver_multiply(
            ctypes.byref(rows),
            ctypes.byref(weight),
            c_void_p(out.data_ptr()),
            *(out.shape[0], threads),
            adapted,
            None if numbers is None else c_void_p(numbers.data_ptr()),
            *room,
        )

    def put_rows(self, to: CBuffer, hidden: Tensor, rows: Tensor) -> None:
        """Row i of `to` is row rows[i] of hidden, float32 [N, width]."""
        self._library.salver_put_rows(
            ctypes.byref(to),
            c_void_p(hidden.data_ptr()),
            c_void_p(rows.data_ptr()),
            rows.numel(),
            c_int64(hidden.stride(0)),
        )

    def pack(self, weight: Tensor, precision: Precision, gated: bool, threads: int) -> tuple[Tensor, Tensor]:
        """(panels, float32 scale of each column for int8) of a weight [N, K], float32 or bfloat16."""
        rows, depth = weight.shape
        panels = num_panels(rows, gated)
        size = depth // INT4_BLOCK * INT4_BYTES if precision is Precision.INT4 else depth
        packed = torch.empty((panels, size * PANEL), dtype=precision.weights)
        scale = torch.empty(panels * PANEL if precision is Precision.INT8 else 0)
        weight = weight.contiguous()
        self._library.salver_pack(
            c_void_p(weight.data_ptr()),
            int(weight.dtype == torch.bfloat16),
            int(precision),
            *(rows, depth, int(gated)),
            c_void_p(packed.data_ptr()),
            c_void_p(scale.data_ptr()),
            threads,
        )
        return packed, scale


def num_panels(rows: int, gated: bool) -> int:
    """Of a weight with so many rows; a gated one has 16 of each half in a panel."""
    return -(-rows // 2 // LANES) if gated else -(-rows // PANEL)


def _gomp_parallel() -> c_void_p:
    """The entry of the OpenMP runtime that torch brought, so that both use one pool of threads."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    for path in sorted(paths):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    raise KernelUnavailable("torch runs on another OpenMP than GNU's")
