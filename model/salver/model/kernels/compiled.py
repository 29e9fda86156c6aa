"""What the kernel's programs share: a model's packed weights, its operations, the buffers of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import Norm, Weights
from .adapters import in_panels
from .library import (
    INT4_BLOCK,
    CBuffer,
    COperation,
    CProgram,
    CWeight,
    Epilogue,
    Kind,
    Library,
    Precision,
    num_panels,
)

# Buffers of a step, one row for each of its rows.
RESIDUAL, NORMED, HEADS, ATTENDED, INNER, FINAL = range(6)
WIDE = {ATTENDED: 6, INNER: 7}  # of int8 buffers, the floats that they are rounded from
GROUP, INNER_GROUP = 64, 128  # values of an int8 row that share a scale; with int4 weights a block's
LINE = 64  # bytes of a line of the processor's caches
PROGRESS_ROWS = 64  # a step of fewer rows is over before anybody asks how it goes


@dataclass
class Buffer:
    width: int
    precision: Precision

    @property
    def stride(self) -> int:
        """Elements from row to row: an odd number of lines, or a tile's rows meet in few sets of a cache."""
        size = self.precision.activations.itemsize
        return (-(-self.width * size // LINE) | 1) * LINE // size if self.width else 0


class Compiled:
    """A list of operations over buffers, made of modules whose weights it takes over."""

    def __init__(self, library: Library, precision: Precision, threads: int, pairs: bool) -> None:
        """`pairs`: bf16 is multiplied with bf16, else with float32."""
        self.device = torch.device("cpu")
        self.precision = precision
        self._library = library
        self._threads = threads
        self._pairs = pairs
        # What products read.
        self._inputs = precision
        if precision is Precision.BFLOAT16 and not pairs:
            self._inputs = Precision.FLOAT32
        elif precision.rounds_activations:
            self._inputs = Precision.INT8
        self._kept: list[object] = []  # what C points to
        self._weights: list[CWeight] = []
        self._operations: list[COperation] = []
        self._norms: dict[Norm, tuple[int, int | None]] = {}  # addresses of scale and shift
        self._buffers: list[Buffer] = []
        self._rows = 0
        self._program = CProgram()

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights."""
        return [kept for kept in self._kept if isinstance(kept, Tensor)]

    def _make_buffers(self, hidden: int, heads: int, attended: int, inner: int) -> list[Buffer]:
        """In the order of their numbers, of these widths."""
        wide = int(self.precision.rounds_activations)
        return [
            Buffer(hidden, Precision.FLOAT32),
            Buffer(hidden, self._inputs),
            Buffer(heads, Precision.FLOAT32),
            Buffer(attended, self._inputs),
            Buffer(inner, self._inputs),
            Buffer(hidden, Precision.FLOAT32),
            Buffer(wide * attended, Precision.FLOAT32),
            Buffer(wide * inner, Precision.FLOAT32),
        ]

    # ---- operations ----

    def _first(self, buffer: int) -> int:
        """Where an operation writes what a product reads from `buffer`: int8 needs whole rows first."""
        return WIDE[buffer] if self.precision.rounds_activations else buffer

    def _narrow(self, buffer: int) -> None:
        if self.precision.rounds_activations:
            self._add(Kind.QUANTIZE, WIDE[buffer], buffer)

    def _add(
        self,
        kind: Kind,
        in_: int,
        out: int,
        *,
        layer: int = 0,
        weight: int = -1,
        extra: int = -1,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
        window: int = 0,
        adapted: int = -1,
    ) -> None:
        """`adapted`: which of the places that adapters change; -1 for none."""
        operation = COperation(
            kind=kind, layer=layer, in_=in_, out=out, weight=weight, extra=extra,
            epilogue=epilogue, activation=activation, window=window, adapted=adapted,
        )  # fmt: skip
        self._operations.append(operation)

    def _norm(self, norm: Norm | None, in_: int, out: int, adapted: int = -1) -> None:
        assert norm is not None and norm.weight is not None  # see `unsupported`
        if norm not in self._norms:
            shift = None if norm.bias is None else self._keep(norm.bias.detach().float())
            self._norms[norm] = (self._keep(norm.weight.detach().float()), shift)
        self._add(Kind.RMS_NORM if norm.rms else Kind.LAYER_NORM, in_, out, adapted=adapted)
        operation = self._operations[-1]
        operation.scale, operation.shift = self._norms[norm]
        operation.epsilon = norm.eps

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as this."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _weight(self, module: Weights, precision: Precision | None = None, gated: bool = False) -> int:
        """Packs a matrix and empties its module."""
        precision = self.precision if precision is None else precision
        weight, bias = module.weight.detach(), module.bias
        module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        packed, scale = self._library.pack(weight, precision, gated, self._threads)
        rows, depth = weight.shape
        panels = num_panels(rows, gated)
        found = CWeight(data=self._keep(packed), precision=precision, rows=rows, depth=depth, panels=panels)
        if scale.numel():
            found.column_scale = self._keep(scale)
        if bias is not None:
            found.bias = self._keep(in_panels(bias.detach().float()[:, None], gated))
        self._weights.append(found)
        return len(self._weights) - 1

    def _table(self, module: Weights) -> int:
        """A matrix that is read by rows, as it is."""
        weight = module.weight.detach().contiguous()
        if self.precision is Precision.INT4:  # whose weights came in float32
            weight = weight.to(torch.bfloat16)
        precision = Precision.FLOAT32 if weight.dtype == torch.float32 else Precision.BFLOAT16
        rows, depth = weight.shape
        self._weights.append(
            CWeight(data=self._keep(weight), precision=precision, rows=rows, depth=depth, panels=0)
        )
        return len(self._weights) - 1

    def _aliases(self) -> list[CBuffer]:
        """Further buffers, which are parts of the others."""
        return []

    def _reserve(self, rows: int) -> bool:
        """Room for a step of so many rows. Returns whether the buffers are new."""
        if rows <= self._rows:
            return False
        self._rows = max(rows, 2 * self._rows)
        self._tensors = [
            torch.zeros((self._rows, buffer.stride), dtype=buffer.precision.activations)[:, : buffer.width]
            for buffer in self._buffers
        ]
        int4 = self.precision is Precision.INT4
        group, inner_group = (INT4_BLOCK, INT4_BLOCK) if int4 else (GROUP, INNER_GROUP)
        groups = max(-(-buffer.width // group) for buffer in self._buffers)
        # One product at a time reads int8 rows: their scales take turns in one place.
        self._group_scale = torch.zeros((groups, self._rows))
        self._group_sum = torch.zeros((groups, self._rows)) if int4 else None
        self._row_offset = torch.zeros(self._rows)
        buffers = [
            CBuffer(
                data=tensor.data_ptr(), stride=buffer.stride, precision=buffer.precision, width=buffer.width,
                group_scale=self._group_scale.data_ptr(), row_offset=self._row_offset.data_ptr(),
                scale_stride=self._rows, group=inner_group if number == INNER else group,
                group_sum=None if self._group_sum is None else self._group_sum.data_ptr(),
            )
            for number, (tensor, buffer) in enumerate(zip(self._tensors, self._buffers, strict=True))
        ]  # fmt: skip
        buffers += self._aliases()
        program = self._program
        self._c_buffers = (CBuffer * len(buffers))(*buffers)
        self._c_weights = (CWeight * len(self._weights))(*self._weights)
        self._c_operations = (COperation * len(self._operations))(*self._operations)
        program.operations, program.num_operations = self._c_operations, len(self._operations)
        program.buffers, program.weights = self._c_buffers, self._c_weights
        program.pairs = self._pairs
        return True
