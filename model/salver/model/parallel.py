"""Tensor parallelism: every rank holds a part of each large matrix (Shoeybi et al. 2019, "Megatron-LM").

The rules are those of the one stack that builds every spec, by the role of a matrix in it; a family says
nothing. A rank has some of the heads, with their keys and values, some of the columns inside an MLP or an
expert, and some of the vocabulary. What a block adds is the sum over the ranks; everything else is computed
by all of them alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError
from .spec import AlibiPositions, BucketPositions, ModelSpec


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes, and how it works with the others.

    reduce: of a tensor of equal shape at every rank, the sum. gather: of [R, n], all ranks' side by side.
    """

    rank: int
    size: int
    reduce: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


Ranges = tuple[tuple[int, int], ...]  # (start, length)


@dataclass(frozen=True)
class Part:
    """Of a parameter, what one rank holds: these ranges of a dimension, one after the other.

    `padded`: with zeros up to so many; `nothing`: zeros alone (a bias that another rank adds).
    """

    dim: int
    ranges: Ranges
    padded: int = 0
    nothing: bool = False

    def of(self, whole: Tensor) -> Tensor:
        if self.nothing:
            return torch.zeros_like(whole)
        found = torch.cat([whole.narrow(self.dim, start, length) for start, length in self.ranges], self.dim)
        missing = self.padded - found.shape[self.dim]
        if missing <= 0:
            return found
        shape = list(found.shape)
        shape[self.dim] = missing
        return torch.cat((found, found.new_zeros(shape)), self.dim)


class Sharding:
    """How a spec's parameters are divided, seen from one rank."""

    def __init__(self, spec: ModelSpec, rank: int, size: int) -> None:
        """Raises CheckpointError where they cannot be."""
        self.spec = spec
        self.rank = rank
        self.size = size
        self._check()
        self._rows = -(-spec.vocab_size // size)

    def _check(self) -> None:
        spec, size = self.spec, self.size
        if spec.encoder is not None or isinstance(spec.positions, BucketPositions):
            self._refuse("encoder-decoders are not divided")
        experts = spec.experts
        for what, count in (
            ("heads", spec.num_heads),
            (
                "columns of the MLP",
                spec.intermediate_size if len(spec.expert_layers) < spec.num_layers else 0,
            ),
            ("columns of an expert", experts.intermediate_size if experts else 0),
            ("columns of the shared expert", experts.shared_intermediate_size if experts else 0),
        ):
            if count % size:
                self._refuse(f"{count} {what} cannot be divided among them")
        kv_heads = spec.num_kv_heads
        if spec.latent is None and kv_heads % size and size % kv_heads:
            self._refuse(f"{kv_heads} heads of keys can be neither divided nor repeated among them")
        if spec.head_norm is not None and spec.head_norm.scope == "all":
            self._refuse("queries are normalized over all heads")

    def _refuse(self, why: str) -> None:
        raise CheckpointError(f"--tensor-parallel-size {self.size}: {self.spec.architecture}: {why}")

    @property
    def local_spec(self) -> ModelSpec:
        """The spec of what this rank holds: a smaller model of the same kind."""
        spec, size = self.spec, self.size
        positions = spec.positions
        if isinstance(positions, AlibiPositions):
            first = self.rank * spec.num_heads // size
            positions = replace(positions, slopes=positions.slopes[first : first + spec.num_heads // size])
        experts = spec.experts
        if experts is not None:
            experts = replace(
                experts,
                intermediate_size=experts.intermediate_size // size,
                shared_intermediate_size=experts.shared_intermediate_size // size,
            )
        dense = len(spec.expert_layers) < spec.num_layers
        return replace(
            spec,
            vocab_size=self._rows,
            num_heads=spec.num_heads // size,
            num_kv_heads=spec.num_kv_heads if spec.latent else max(1, spec.num_kv_heads // size),
            intermediate_size=spec.intermediate_size // size if dense else spec.intermediate_size,
            positions=positions,
            experts=experts,
        )

    def part(self, name: str) -> Part | None:
        """Of the stack's parameter `name`; None: all of it."""
        role, _, kind = re.sub(r"^layers\.\d+\.", "", name).rpartition(".")
        bias = kind == "bias"
        spec = self.spec
        inner = (spec.intermediate_size,) * (2 if spec.gated else 1)
        experts = spec.experts
        if role in ("embed", "head"):
            start = min(self.rank * self._rows, spec.vocab_size)
            return Part(0, ((start, min(self._rows, spec.vocab_size - start)),), self._rows)
        if role == "qkv":
            query, key, _ = spec.qkv_sizes
            keys = self._kv_range()
            return Part(0, (self._even(query), _moved(keys, query), _moved(keys, query + key)))
        if role in ("latent.query_up", "latent.up", "sinks"):
            heads = {"latent.query_up": self._query_width, "latent.up": self._up_width, "sinks": 1}[role]
            return Part(0, (self._even(spec.num_heads * heads),))
        if role in ("query_norm", "key_norm") and spec.head_norm and spec.head_norm.scope == "heads":
            return Part(0, (self._even(spec.num_heads) if role == "query_norm" else self._kv_heads(),))
        if role == "attention_out":
            width = spec.latent.value_dim if spec.latent else spec.head_dim
            return self._summed(bias, 1, spec.num_heads * width)
        if role == "up":
            return Part(0, self._sections(inner))
        if role == "down":
            return self._summed(bias, 1, spec.intermediate_size)
        if experts is not None and role.startswith("experts."):
            half = (experts.intermediate_size,) * (2 if spec.gated else 1)
            shared = (experts.shared_intermediate_size,) * (2 if spec.gated else 1)
            if role == "experts.up":
                return Part(1, self._sections(half))
            if role == "experts.down":
                return self._summed(bias, 2, experts.intermediate_size)
            if role == "experts.shared_up":
                return Part(0, self._sections(shared))
            if role == "experts.shared_down":
                return self._summed(bias, 1, experts.shared_intermediate_size)
        return None

    @property
    def _query_width(self) -> int:
        latent = self.spec.latent
        return latent.key_dim + latent.rotary_dim if latent else 0

    @property
    def _up_width(self) -> int:
        latent = self.spec.latent
        return latent.key_dim + latent.value_dim if latent else 0

    def _even(self, whole: int) -> tuple[int, int]:
        return self.rank * whole // self.size, whole // self.size

    def _sections(self, sizes: tuple[int, ...]) -> Ranges:
        """Of several things side by side, a part of each."""
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(_moved(self._even(size), begin) for size, begin in zip(sizes, begins, strict=True))

    def _summed(self, bias: bool, dim: int, whole: int) -> Part:
        """A matrix whose products are summed over the ranks: its bias is the first one's to add."""
        if bias:
            return Part(-1, ((0, self.spec.hidden_size),), nothing=self.rank > 0)
        return Part(dim, (self._even(whole),))

    def _kv_heads(self) -> tuple[int, int]:
        """First and number of the heads of keys; of fewer heads than ranks, the one that its queries read."""
        heads = self.spec.num_kv_heads
        return self.rank * heads // self.size, max(1, heads // self.size)

    def _kv_range(self) -> tuple[int, int]:
        first, count = self._kv_heads()
        return first * self.spec.head_dim, count * self.spec.head_dim


def _moved(part: tuple[int, int], by: int) -> tuple[int, int]:
    return part[0] + by, part[1]


class Shards:
    """What a rank's model asks of the others; see the hooks in `transformer`, `layers` and `experts`."""

    def __init__(self, ranks: Ranks, vocab_size: int, rows: int) -> None:
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._first, self._rows = ranks.rank * rows, rows

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """[N, width] of tokens of which this rank holds `weight` [rows, width]."""
        local = token_ids - self._first
        foreign = (local < 0) | (local >= self._rows)
        found = F.embedding(local.masked_fill(foreign, 0), weight)
        return self._ranks.reduce(found.masked_fill_(foreign[:, None], 0))

    def whole_logits(self, logits: Tensor) -> Tensor:
        """[R, vocab_size] of this rank's [R, rows]."""
        return self._ranks.gather(logits)[:, : self._vocab_size]


def connect(model: nn.Module, sharding: Sharding, ranks: Ranks) -> None:
    """Gives a model, built by `sharding.local_spec`, its places where ranks meet."""
    from .experts import Experts
    from .transformer import Layer, Transformer

    assert isinstance(model, Transformer)
    spec = sharding.spec
    model.shards = Shards(ranks, spec.vocab_size, sharding.local_spec.vocab_size)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.attention_out.reduce = ranks.reduce
        if isinstance(layer.experts, Experts):
            layer.experts.reduce = ranks.reduce
        else:
            layer.down.reduce = ranks.reduce
