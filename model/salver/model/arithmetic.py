"""What a model takes and costs, from the shapes of its tensors: bytes, and operations a token. No torch.

A multiplication and an addition are two operations. Only products are counted: matrices with rows, and
queries and values with keys. Norms, activations and softmax are left out: together they are a percent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .encoder_spec import EncoderSpec
from .spec import Cat, ModelSpec, SinusoidalPositions, Source, Stack, names_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_PANEL, _LANES = 32, 16  # columns of the native kernel's packed panels; see kernels/library.py
_TILE = 64  # keys of a tile of its attention
_INT4_BLOCK, _INT4_BYTES = 32, 20  # likewise
_LAYER = re.compile(r"layers\.\d+\.")
_EMBEDDINGS = (
    "embed",
    "positions",
    "segments",
    "embedding_norm",
    "embed_in",
    "embed_out",
    "embedding_projection",
)
_TABLES = (
    "embed",
    "positions",
    "segments",
    "buckets",
    "distances",
    "distance.key",
    "distance.query",
    "sinks",
    "experts.correction",
    "logit_bias",
)  # no row multiplies them
_ATTENTION = (
    *("qkv", "attention_out", "latent", "buckets", "sinks", "query_norm", "key_norm", "cross"),
    *("distance", "distances"),
)
_ENCODER = "encoder."  # of an encoder-decoder
_MLP = ("up", "down", "convolution")


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """One of our tensors, and the checkpoint's tensors that it was made of, by the names in the files."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BYTES[self.dtype]

    @property
    def module(self) -> str:
        """Its name without the layer and without "weight" or "bias"."""
        return _LAYER.sub("", self.name).rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        return self.name.endswith(".bias") or self.module in ("experts.correction", "head.bias", "logit_bias")

    @property
    def reads_source(self) -> bool:
        """Whether the tokens of an encoder-decoder's source meet it, and not those of its output."""
        return self.name.startswith(_ENCODER) or self.module == "cross.key_value"

    @property
    def part(self) -> str:
        """embedding, attention, mlp, experts, norm or head."""
        first = self.module.removeprefix(_ENCODER).partition(".")[0]
        if first in _EMBEDDINGS:
            return "embedding"
        if first in _ATTENTION:
            return "attention"
        if first == "experts":
            return "experts"
        if first in ("head", "logit_bias", "classifier"):
            return "head"
        return "mlp" if first in _MLP else "norm"

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix (or a stack of them) that rows are multiplied with."""
        return (
            len(self.shape) >= 2
            and self.name.endswith(".weight")
            and self.module.removeprefix(_ENCODER) not in _TABLES
            and "norm" not in self.module
        )


def source_names(source: Source, full_name: Callable[[str], str]) -> tuple[str, ...]:
    """The checkpoint tensors of a source, as `full_name` has them. Of a stack of experts the first and the
    last, as a range."""
    if isinstance(source, Stack) and len(source.sources) > 1:
        first, last = (source_names(part, full_name) for part in (source.sources[0], source.sources[-1]))
        return tuple(map(_ranged, first, last))
    if isinstance(source, Cat):
        parts = (name for part in source.sources for name in source_names(part, full_name))
        return tuple(dict.fromkeys(parts))
    return tuple(dict.fromkeys(map(full_name, names_of(source))))


def _ranged(first: str, last: str) -> str:
    """`a.0.b` and `a.7.b` as `a.{0..7}.b`."""
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(one if one == other else f"{{{one}..{other}}}" for one, other in pairs)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a server holds a model's tensors: as they were loaded, or packed by the native kernel.

    `quantization` is "none", "int8" or "int4" (there the head is int8, a table bfloat16). The kernel packs
    matrices in panels of 32 columns, keeps norms, biases and scales in float32, and holds a tied embedding
    once: as the packed head. Of an encoder, whose head stays in the precision it came in, that is a copy
    beside the table.
    """

    native: bool = False
    quantization: str = "none"

    def nbytes(self, tensor: LoadedTensor, spec: ModelSpec | EncoderSpec) -> int:
        """Bytes of one tensor; a copy for a tied head counts with the table."""
        if (
            isinstance(spec, EncoderSpec)
            and spec.disentangled is not None
            and tensor.name == "distances.weight"
        ):
            # Every layer keeps keys and queries that were made of it.
            return tensor.nbytes * (1 + spec.disentangled.kinds * spec.num_layers)
        if not self.native:
            return tensor.nbytes
        if isinstance(spec, EncoderSpec):
            return _packed_encoder_bytes(tensor, spec, self.quantization == "int8")
        if tensor.name.startswith(_ENCODER):  # its products are in float32 whatever the decoder is in
            columns = _columns(tensor.shape[0], False) if tensor.multiplies else 0
            return (columns * (tensor.shape[1] + 1) if columns else tensor.size) * BYTES["float32"]
        if tensor.module == "buckets":  # as the bias of every distance
            return spec.num_heads * (spec.max_position_embeddings + _TILE) * BYTES["float32"]
        gated = spec.gated and tensor.module == "up"
        if tensor.multiplies or (tensor.module == "embed" and spec.tied_head):
            rows, depth = tensor.shape
            columns = _columns(rows, gated)
            if self.quantization == "none":
                return columns * depth * BYTES[tensor.dtype]
            if self.quantization == "int4" and tensor.module not in ("embed", "head"):
                return columns * depth * _INT4_BYTES // _INT4_BLOCK
            return columns * (depth + BYTES["float32"])
        if tensor.module in ("embed", "positions"):
            return tensor.size * BYTES["bfloat16"] if self.quantization == "int4" else tensor.nbytes
        size = tensor.size if "norm" in tensor.module else _columns(tensor.size, gated)
        return size * BYTES["float32"]

    def total(self, tensors: Iterable[LoadedTensor], spec: ModelSpec | EncoderSpec) -> int:
        """Bytes of all of them, and of the sinusoids that the kernel holds as a table beside them."""
        found = sum(self.nbytes(tensor, spec) for tensor in tensors)
        if self.native and isinstance(spec, ModelSpec) and isinstance(spec.positions, SinusoidalPositions):
            dtype = "bfloat16" if self.quantization == "int4" else "float32"
            found += spec.max_position_embeddings * spec.hidden_size * BYTES[dtype]
        return found


def _columns(rows: int, gated: bool) -> int:
    """Columns of the panels of so many rows; a gated matrix has 16 of each half in one."""
    return _PANEL * (-(-rows // 2 // _LANES) if gated else -(-rows // _PANEL))


def _packed_encoder_bytes(tensor: LoadedTensor, spec: EncoderSpec, int8: bool) -> int:
    matrix = BYTES[tensor.dtype]
    gated = spec.gated and tensor.module == "up"
    if tensor.module == "embed" and spec.head is not None and spec.head.tied:
        return tensor.nbytes + _columns(tensor.shape[0], False) * tensor.shape[1] * matrix
    if tensor.multiplies:
        rows, depth = tensor.shape
        if int8 and tensor.part != "head":
            return _columns(rows, gated) * (depth + BYTES["float32"])
        return _columns(rows, gated) * depth * matrix
    if tensor.module in _TABLES:
        return tensor.nbytes
    size = tensor.size if "norm" in tensor.module else _columns(tensor.size, gated)
    return size * BYTES["float32"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a token: operations, and the bytes of weights and cache that are read for it alone."""

    operations: float
    nbytes: float


class Arithmetic:
    """The costs of one model as one server holds it."""

    def __init__(
        self, spec: ModelSpec | EncoderSpec, tensors: Sequence[LoadedTensor], storage: Storage, dtype: str
    ) -> None:
        """`dtype` is the cache's."""
        self._spec = spec
        self._tensors = tensors
        self._storage = storage
        self._value_bytes = BYTES[dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes of the cache; 0 of an encoder, which has none."""
        spec = self._spec
        return 0 if isinstance(spec, EncoderSpec) else spec.kv_bytes_per_token(self._value_bytes)

    @property
    def body_operations(self) -> float:
        """Of any token, at least: the products of all layers, without attention's and the head's."""
        return 2 * self._multiplied(head=False, source=self._reads)

    @property
    def _reads(self) -> bool:
        """Whether prompts are sources, which an encoder reads."""
        return isinstance(self._spec, ModelSpec) and self._spec.encoder is not None

    def decode(self, context: int) -> Cost | None:
        """Of the token that comes after `context - 1` others, alone in its step.

        Of an encoder-decoder, beside a source as long. None where nothing is generated.
        """
        spec = self._spec
        if isinstance(spec, EncoderSpec) or spec.body:
            return None
        seen = [min(context, spec.window(layer) or context) for layer in range(spec.num_layers)]
        if self._reads:
            seen += [context] * spec.num_layers
        attention = 4 * spec.num_heads * spec.head_dim * sum(seen)
        cache = self.kv_bytes_per_token / spec.num_layers * sum(seen)
        return Cost(2 * self._multiplied(head=True) + attention, self._read_bytes() + cache)

    def prefill(self, length: int, batch: int) -> Cost:
        """Of each token of an input of `length`, `batch` tokens in a step, which reads the weights once.

        A decoder's head reads the last one alone. Of an encoder-decoder, of each token of a source.
        """
        spec = self._spec
        if isinstance(spec, ModelSpec) and spec.encoder is not None:
            reads = spec.encoder
            operations = 2 * self._multiplied(head=False, source=True)
            operations += 4.0 * reads.num_heads * reads.head_dim * length * reads.num_layers
            weights = sum(self._storage.nbytes(t, spec) for t in self._tensors if t.reads_source)
            return Cost(operations, weights / batch)
        if isinstance(spec, EncoderSpec):
            head = spec.head is not None and spec.head.reads != "input"
            # Products with distances are half of those with a key and its value.
            distances = (
                0
                if spec.disentangled is None
                else spec.disentangled.kinds * min(length - 0.5, spec.disentangled.num_buckets)
            )
            seen = [
                float(min(length, 2 * window + 1 if window else length)) + distances
                for window in map(spec.window, range(len(spec.order)))
            ]
        else:
            head = False
            seen = [_mean_seen(length, spec.window(layer)) for layer in range(spec.num_layers)]
        attention = 4 * spec.num_heads * spec.head_dim * sum(seen)
        operations = 2 * self._multiplied(head=head) + attention
        if not head:
            operations += 2 * self._head_values() / length
        return Cost(operations, self._storage.total(self._tensors, spec) / batch)

    def _multiplied(self, *, head: bool, source: bool = False) -> float:
        """Values of the matrices that a token's row is multiplied with; `source`: of a source."""
        found = sum(
            t.size * self._share(t)
            for t in self._tensors
            if t.multiplies and t.part != "head" and t.reads_source == source
        )
        return found + (self._head_values() if head else 0)

    def _head_values(self) -> int:
        spec = self._spec
        values = sum(t.size for t in self._tensors if t.multiplies and t.part == "head")
        if isinstance(spec, EncoderSpec):
            tied = spec.head is not None and spec.head.tied
        else:
            tied = spec.tied_head and not spec.body
        return values + (sum(t.size for t in self._tensors if t.name == "embed.weight") if tied else 0)

    def _share(self, tensor: LoadedTensor) -> float:
        """How often a token meets the tensor: a part of the experts, or a layer that is used again."""
        spec = self._spec
        if isinstance(spec, EncoderSpec):
            in_layer = tensor.name.startswith("layers.")
            return len(spec.order) / spec.num_layers if in_layer else 1.0
        if spec.experts is not None and tensor.module in ("experts.up", "experts.down"):
            return spec.experts.per_token / spec.experts.count
        return 1.0

    def _read_bytes(self) -> float:
        """Of the weights, what a step of one token reads."""
        tied = isinstance(self._spec, ModelSpec) and self._spec.tied_head
        return sum(
            self._storage.nbytes(t, self._spec) * self._share(t)
            for t in self._tensors
            if not t.reads_source
            and (t.module not in ("embed", "positions") or (t.module == "embed" and tied))
        )


def _mean_seen(length: int, window: int | None) -> float:
    """Positions that a token of a prompt sees, itself included, on average."""
    if window is None or length <= window:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device does at best (Williams et al. 2009)."""

    bytes_per_second: float
    operations_per_second: float

    def tokens_per_second(self, cost: Cost) -> float:
        """A bound: operations and reading may overlap, so the longer of the two counts."""
        return 1 / max(cost.operations / self.operations_per_second, cost.nbytes / self.bytes_per_second)
