"""Adapters in the native kernel: tables of what each changes at each operation (`source/adapters.h`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter_base import HEAD
from ..adapter_reader import Adapter, LowRank
from ..errors import CheckpointError
from .library import LANES, PANEL, CAdapted, CBuffer, CWeight, Library, Precision, num_panels

RANKS = 8  # ranks are padded to a multiple of so many


@dataclass(frozen=True, slots=True)
class Place:
    """An operation that adapters may change. `kind` is "linear", "norm" or "embedding"."""

    number: int
    kind: str
    rows: int = 0  # of a linear map's weight
    gated: bool = False


def unsupported(adapter: Adapter) -> str | None:
    """What of an adapter the kernel does not do; None: it does all of it."""
    for name in (*adapter.low_rank, *adapter.replaced):
        if name.partition(".")[0] == "classifier":
            return f"another {name}"
    for name in adapter.replaced:
        layer, _, kind = name.rpartition(".")
        if layer == "positions" or (kind == "weight" and layer.startswith("layers.") and "norm" not in layer):
            return f"another {name}"
        if name == f"{HEAD}.weight" and HEAD in adapter.low_rank:
            return f"another {name} with low-rank matrices too"
    return None


class NativeAdapters:
    """Some adapters, ready for a model's steps: `table` is [places, adapters]."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        places: Mapping[str, Place],
        head_rows: int,
        library: Library,
        precision: Precision,
        threads: int,
    ) -> None:
        """Raises CheckpointError for what the kernel does not do."""
        self._kept: list[Tensor] = []  # what C points to
        self._library, self._precision, self._threads = library, precision, threads
        self.count = len(adapters)
        self.table = (CAdapted * (max(1, len(places)) * max(1, self.count)))()
        self.head_table = (CAdapted * max(1, self.count))()
        self.heads: dict[int, CWeight] = {}  # of adapters that have one of their own
        head = Place(0, "linear", head_rows)
        for number, adapter in enumerate(adapters):
            if (reason := unsupported(adapter)) is not None:
                raise CheckpointError(f"the native kernel (--kernels) does not do {reason} in an adapter")

            def slot(layer: str, number: int = number) -> tuple[CAdapted, Place]:
                if layer == HEAD:
                    return self.head_table[number], head
                return self.table[places[layer].number * self.count + number], places[layer]

            for layer, change in adapter.low_rank.items():
                self._put_low_rank(*slot(layer), change)
            for name, value in adapter.replaced.items():
                layer, _, kind = name.rpartition(".")
                if name == f"{HEAD}.weight":
                    self.heads[number] = self._weight(value, adapter.replaced.get(f"{HEAD}.bias"))
                else:
                    self._put(*slot(layer), kind, value)
        ranks = [change.a.shape[0] for adapter in adapters for change in adapter.low_rank.values()]
        self.width = -(-max(ranks, default=1) // RANKS) * RANKS
        self.shrunk = torch.zeros((0, self.width))
        self.numbers = self.head_numbers = torch.empty(
            0, dtype=torch.int32
        )  # of each row; empty: none has one

    def rows(self, count: int) -> Tensor:
        """Room for so many rows' products with the first matrices."""
        if len(self.shrunk) < count:
            self.shrunk = torch.zeros((2 * count, self.width))
        return self.shrunk

    def _put_low_rank(self, to: CAdapted, place: Place, change: LowRank) -> None:
        pad = -len(change.a) % RANKS
        a = torch.nn.functional.pad(change.a, (0, 0, 0, pad))
        b = torch.nn.functional.pad(change.b, (0, pad))
        to.rank = len(a)
        if place.kind == "embedding":
            to.a, to.b = self._keep(a.T), self._keep(b.T)
            to.scale = None if change.scale is None else self._keep(change.scale)
            return
        panels = in_panels(b, place.gated)
        to.a, to.b, to.ranks = self._keep(a), self._keep(panels), self._keep(_bounds(panels))
        if change.scale is not None:
            to.scale = self._keep(in_panels(change.scale[:, None], place.gated))

    def _put(self, to: CAdapted, place: Place, kind: str, value: Tensor) -> None:
        value = value.float()
        if place.kind == "linear":
            to.bias = self._keep(in_panels(value[:, None], place.gated))
        elif place.kind == "norm" and kind == "weight":
            to.scale = self._keep(value)
        else:
            to.bias = self._keep(value)

    def _weight(self, weight: Tensor, bias: Tensor | None) -> CWeight:
        packed, scale = self._library.pack(weight, self._precision, False, self._threads)
        rows, depth = weight.shape
        found = CWeight(
            data=self._keep(packed), precision=self._precision, rows=rows, depth=depth,
            panels=num_panels(rows, False),
        )  # fmt: skip
        if scale.numel():
            found.column_scale = self._keep(scale)
        if bias is not None:
            found.bias = self._keep(in_panels(bias.float()[:, None], False))
        return found

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as this."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    # ---- steps ----

    def begin(self, rows: Sequence[int]) -> None:
        self.numbers = _numbers(rows)

    def begin_sources(self, rows: Sequence[int]) -> None:
        raise NotImplementedError("adapters of encoder-decoders are plain torch's")

    def begin_head(self, rows: Sequence[int]) -> None:
        self.head_numbers = _numbers(rows)

    def multiply_own_heads(self, buffer: CBuffer, hidden: Tensor, out: Tensor) -> None:
        """The rows of out [R, vocab_size] whose adapters have heads of their own; `buffer` takes the rows."""
        for number, weight in self.heads.items():
            own = (self.head_numbers == number).nonzero().flatten()
            for rows in torch.split(own, 64):
                found = torch.empty((rows.numel(), weight.rows))
                self._library.put_rows(buffer, hidden, rows)
                self._library.multiply(buffer, weight, found, self._threads)
                out[rows] = found


def _numbers(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows if any(number >= 0 for number in rows) else [], dtype=torch.int32)


def in_panels(matrix: Tensor, gated: bool) -> Tensor:
    """float32 [panels, R, PANEL] of [N, R]: its rows as columns of the packed panels, zeros for padding."""
    rows, width = matrix.shape
    panels = num_panels(rows, gated)
    if not gated:
        out = torch.zeros((panels * PANEL, width))
        out[:rows] = matrix
        return out.view(panels, PANEL, width).transpose(1, 2).contiguous()
    lanes = torch.zeros((panels, 2, LANES, width))
    for part, values in enumerate(torch.split(matrix, rows // 2)):
        half = torch.zeros((panels * LANES, width))
        half[: rows // 2] = values
        lanes[:, part] = half.view(panels, LANES, width)
    return lanes.view(panels, PANEL, width).transpose(1, 2).contiguous()


def _bounds(panels: Tensor) -> Tensor:
    """int32 [panels, 2]: the first rank that is not all zero, and the one past the last."""
    used = (panels != 0).any(dim=-1).int()
    first, last = used.argmax(dim=1), used.shape[1] - used.flip(1).argmax(dim=1)
    return (torch.stack((first, last), dim=1) * used.any(dim=1)[:, None]).int()
