"""Many adapters and none in one batch, beside a model's weights.

Nothing is merged: each row of a step gets what its own adapter changes (see `adapter_reader.Adapter`),
and rows without one get nothing. So the base and any number of adapters share a batch, a cache and the
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted_distances import AdaptedDistances, is_of_distances
from .adapter_base import HEAD, AdapterBase
from .adapter_reader import Adapter, LowRank, files_of, load_adapter
from .encoder import Encoder
from .experts import ExpertProducts
from .latent import HeadProduct
from .layers import Embedding, Norm
from .transformer import Transformer

__all__ = ["Adapter", "AdapterBase", "AdapterSet", "LowRank", "files_of", "load_adapter"]

_RANKS = 8  # ranks of what is computed together are padded to a multiple of so many


class Installed(Protocol):
    """Adapters in the place where a model's products are computed; rows bear their numbers, -1 for none."""

    def install(self) -> None: ...

    def begin(self, rows: Sequence[int]) -> None: ...

    def begin_sources(self, rows: Sequence[int]) -> None: ...

    def begin_head(self, rows: Sequence[int]) -> None: ...


@runtime_checkable
class Adaptable(Protocol):
    """A model that computes its adapters itself, as the native kernel does."""

    def prepare_adapters(self, adapters: Sequence[Adapter]) -> Installed: ...


class AdapterSet:
    """The adapters of a model. `select` says which rows are whose, `select_head` which the head reads.

    Of an encoder-decoder `select_sources` goes before, where the step reads sources.
    """

    def __init__(
        self,
        model: object,
        adapters: Mapping[str, Adapter],
        row_multiple: int = 1,
        *,
        install: bool = True,
    ) -> None:
        """Of a `Transformer`, an `Encoder` or an `Adaptable`; `row_multiple` as in `numerics.row_multiple`.

        Without `install` the model stays as it is, with the adapters that it has, until that is called.

        Raises CheckpointError for an adapter that the native kernel does not know.
        """
        self.adapters = dict(adapters)
        self._numbers = {name: number for number, name in enumerate(adapters)}
        self._owners: list[int] = []
        of = list(adapters.values())
        if isinstance(model, Transformer | Encoder):
            self._installed: Installed = _Beside(model, of, row_multiple)
        else:
            assert isinstance(model, Adaptable)
            self._installed = model.prepare_adapters(of)
        if install:
            self.install()

    def install(self) -> None:
        """Puts them there, in the place of another set's."""
        self._installed.install()

    def select(self, parts: Sequence[tuple[str, range]]) -> None:
        """Of the next step, the rows of each part, and the name of its adapter ("" for none)."""
        self._owners = [-1] * max((part.stop for _, part in parts), default=0)
        for name, part in parts:
            if name:
                self._owners[part.start : part.stop] = [self._numbers[name]] * len(part)
        self._installed.begin(self._owners)

    def select_sources(self, parts: Sequence[tuple[str, int]]) -> None:
        """Of the sources that an encoder-decoder reads next, until `select`: adapter and rows of each."""
        owners: list[int] = []
        for name, count in parts:
            owners += [self._numbers[name] if name else -1] * count
        self._installed.begin_sources(owners)

    def select_head(self, rows: Sequence[int]) -> None:
        """Of the head's next product, which rows of the step it reads."""
        self._installed.begin_head([self._owners[row] if row < len(self._owners) else -1 for row in rows])

    def select_heads(self, names: Sequence[str]) -> None:
        """Of the head's next product, the adapter of each row ("" for none)."""
        self._installed.begin_head([self._numbers[name] if name else -1 for name in names])


# ---- in plain torch ----


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of some adapters in order as many rows of each, padded with its first.

    `places` are those among the padded rows that are no padding, `targets` the step's rows that they are.
    """

    rows: Tensor
    width: int
    places: Tensor
    targets: Tensor


@dataclass(slots=True)
class _Active:
    """The adapters of a step, and whose its rows are."""

    device: torch.device
    multiple: int
    numbers: tuple[int, ...] = ()
    _owners: Sequence[int] = ()
    _rows: dict[int, list[int]] = field(default_factory=dict)
    _made: dict[tuple[int, ...], _Rows] = field(default_factory=dict)
    _table: Tensor | None = None

    def begin(self, owners: Sequence[int]) -> None:
        self._owners = owners
        self._rows = {}
        self._made = {}
        self._table = None
        for row, number in enumerate(owners):
            if number >= 0:
                self._rows.setdefault(number, []).append(row)
        self.numbers = tuple(sorted(self._rows))

    def of(self, numbers: tuple[int, ...]) -> _Rows:
        found = self._made.get(numbers)
        if found is None:
            found = self._made[numbers] = self._make(numbers)
        return found

    def owners(self, rows: Tensor) -> Tensor:
        """int64 [n]: whose these rows of the step are; -1: nobody's, as those of padding."""
        if self._table is None:
            self._table = torch.tensor([*self._owners, -1], dtype=torch.int64, device=self.device)
        return self._table[rows.clamp(max=len(self._owners))]

    def owner(self, row: int) -> int:
        return self._owners[row] if row < len(self._owners) else -1

    def _make(self, numbers: tuple[int, ...]) -> _Rows:
        most = max(len(self._rows[number]) for number in numbers)
        width = most + -most % self.multiple
        padded, places, targets = list[int](), list[int](), list[int]()
        for number in numbers:
            own = self._rows[number]
            places += range(len(padded), len(padded) + len(own))
            targets += own
            padded += own + own[:1] * (width - len(own))
        tensors = [
            torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in (padded, places, targets)
        ]
        return _Rows(tensors[0], width, tensors[1], tensors[2])


class _Beside:
    """Adapters beside the modules of a model: hooks change what the modules give."""

    def __init__(self, model: Transformer | Encoder, adapters: Sequence[Adapter], row_multiple: int) -> None:
        self._model = model
        self._step, self._sources, self._head = (_Active(model.device, row_multiple) for _ in range(3))
        self._sites: dict[str, _Site] = {}
        self._distances: AdaptedDistances | None = None
        if isinstance(model, Encoder) and model.distances is not None:
            self._distances = AdaptedDistances(model, adapters, self._step.owner)
        for number, adapter in enumerate(adapters):
            for layer, change in adapter.low_rank.items():
                if not is_of_distances(layer):
                    self._site(layer).put_low_rank(number, change)
            for name, value in adapter.replaced.items():
                layer, _, kind = name.rpartition(".")
                if is_of_distances(layer):
                    continue
                if layer.endswith(".latent.up"):  # it is not called: its two halves are, each by itself
                    latent = layer.removesuffix("up")
                    self._site(f"{latent}to_latent").put(number, kind, value)
                    self._site(f"{latent}from_latent").put(number, kind, value)
                else:
                    self._site(layer).put(number, kind, value)

    def _site(self, layer: str) -> _Site:
        if layer not in self._sites:
            name = "tied_head" if layer == HEAD and getattr(self._model, HEAD, None) is None else layer
            module = self._model.get_submodule(name)
            active, first = self._step, layer.partition(".")[0]
            if first in (HEAD, "classifier"):
                active = self._head
            elif first == "encoder" or layer.endswith(".cross.key_value"):
                active = self._sources
            self._sites[layer] = _site_of(module, active)
        return self._sites[layer]

    def install(self) -> None:
        for handle in self._model.adapter_hooks:
            handle.remove()
        self._model.adapter_hooks = tuple(
            site.module.register_forward_hook(site) for site in self._sites.values()
        )
        if self._distances is not None:
            self._distances.install()

    def begin(self, rows: Sequence[int]) -> None:
        self._step.begin(rows)
        self._sources.begin(())

    def begin_sources(self, rows: Sequence[int]) -> None:
        self._sources.begin(rows)
        self._step.begin(())  # an embedding may be one for both

    def begin_head(self, rows: Sequence[int]) -> None:
        self._head.begin(rows)


class _Site:
    """What adapters change of one module. Called after it; changes its output in place."""

    def __init__(self, module: nn.Module, active: _Active) -> None:
        weight = next(module.parameters())
        self.module = module
        self._active = active
        self._like = weight
        self._values: dict[int, dict[str, Tensor]] = {}  # by the adapter's number: "weight", "bias"
        self._low_rank: dict[int, LowRank] = {}

    def put(self, number: int, kind: str, value: Tensor) -> None:
        self._values.setdefault(number, {})[kind] = value.to(self._like)

    def put_low_rank(self, number: int, change: LowRank) -> None:
        scale = None if change.scale is None else change.scale.to(self._like)
        self._low_rank[number] = LowRank(change.a.to(self._like), change.b.to(self._like), scale)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        mine = [n for n in self._active.numbers if n in self._values or n in self._low_rank]
        if mine:
            self._change(args[0], out, mine)

    def _change(self, x: Tensor, out: Tensor, mine: list[int]) -> None:
        raise NotImplementedError

    def _each(self, mine: list[int]) -> Iterator[tuple[dict[str, Tensor], _Rows]]:
        """One after the other, those of `mine` that have tensors of their own."""
        for number in mine:
            if number in self._values:
                yield self._values[number], self._active.of((number,))


class _NormSite(_Site):
    def _change(self, x: Tensor, out: Tensor, mine: list[int]) -> None:
        norm = self.module
        assert isinstance(norm, Norm)
        for own, rows in self._each(mine):
            weight, bias = own.get("weight", norm.weight), own.get("bias", norm.bias)
            out[rows.targets] = norm.scaled(x[rows.targets], weight, bias)


class _HeadProductSite(_Site):
    def _change(self, x: Tensor, out: Tensor, mine: list[int]) -> None:
        module = self.module
        assert isinstance(module, HeadProduct)
        for own, rows in self._each(mine):
            out[rows.targets] = module.product(x[rows.targets], own["weight"])


class _EmbeddingSite(_Site):
    """`a` is transposed, to be read by row."""

    def put_low_rank(self, number: int, change: LowRank) -> None:
        super().put_low_rank(number, change)
        kept = self._low_rank[number]
        self._low_rank[number] = LowRank(kept.a.T.contiguous(), kept.b, kept.scale)

    def _change(self, x: Tensor, out: Tensor, mine: list[int]) -> None:
        for own, rows in self._each(mine):
            out[rows.targets] = F.embedding(x[rows.targets], own["weight"])
        for number in mine:
            change, rows = self._low_rank.get(number), self._active.of((number,))
            if change is not None:
                added = F.linear(F.embedding(x[rows.rows], change.a), change.b)[rows.places]
                value = out[rows.targets] + added
                out[rows.targets] = value if change.scale is None else value * change.scale


class _ExpertsSite(_Site):
    """Called once for each expert, with the tokens that chose it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        mine = [number for number in self._active.numbers if number in self._low_rank]
        if not mine:
            return
        x, expert, tokens = args
        owners = self._active.owners(tokens)
        for number in mine:
            places = (owners == number).nonzero().flatten()
            if not places.numel():
                continue
            padding = places[:1].expand(-places.numel() % self._active.multiple)
            change, rows = self._low_rank[number], x[torch.cat((places, padding))]
            added = F.linear(F.linear(rows, change.a[expert]), change.b[expert])
            out.index_add_(0, places, added[: places.numel()])


class _LinearSite(_Site):
    """Two products for all adapters together that have low-rank matrices and nothing else here."""

    def __init__(self, module: nn.Module, active: _Active) -> None:
        super().__init__(module, active)
        self._bias: Tensor | None = getattr(module, "bias", None)
        self._stacked: tuple[tuple[int, ...], Tensor, Tensor] | None = None  # of the last step

    def _change(self, x: Tensor, out: Tensor, mine: list[int]) -> None:
        plain = tuple(n for n in mine if n not in self._values and self._low_rank[n].scale is None)
        if plain:
            rows, added = self._active.of(plain), self._added(x, plain)
            out.index_add_(0, rows.targets, added)
        for number in mine:
            if number not in plain:
                self._change_one(x, out, number)

    def _change_one(self, x: Tensor, out: Tensor, number: int) -> None:
        own, change, rows = (
            self._values.get(number, {}),
            self._low_rank.get(number),
            self._active.of((number,)),
        )
        weight, bias = own.get("weight"), own.get("bias", self._bias)
        if weight is not None:
            value = F.linear(x[rows.rows], weight)[rows.places]
        else:
            value = out[rows.targets]
            if self._bias is not None:
                value = value - self._bias
        if change is not None:
            added = F.linear(F.linear(x[rows.rows], change.a), change.b)[rows.places]
            value = value + added
            if change.scale is not None:
                value = value * change.scale
        out[rows.targets] = value if bias is None else value + bias

    def _added(self, x: Tensor, numbers: tuple[int, ...]) -> Tensor:
        """[number of targets, out]"""
        if self._stacked is None or self._stacked[0] != numbers:
            changes = [self._low_rank[number] for number in numbers]
            most = max(len(change.a) for change in changes)
            rank = most + -most % _RANKS
            a = torch.stack([F.pad(change.a, (0, 0, 0, rank - len(change.a))) for change in changes])
            b = torch.stack([F.pad(change.b, (0, rank - len(change.a))) for change in changes])
            self._stacked = (numbers, a, b)
        _, a, b = self._stacked
        rows = self._active.of(numbers)
        own = x.index_select(0, rows.rows).view(len(numbers), rows.width, -1)
        return torch.bmm(torch.bmm(own, a.mT), b.mT).flatten(0, 1).index_select(0, rows.places)


def _site_of(module: nn.Module, active: _Active) -> _Site:
    if isinstance(module, Norm):
        return _NormSite(module, active)
    if isinstance(module, Embedding):
        return _EmbeddingSite(module, active)
    if isinstance(module, HeadProduct):
        return _HeadProductSite(module, active)
    if isinstance(module, ExpertProducts):
        return _ExpertsSite(module, active)
    return _LinearSite(module, active)
