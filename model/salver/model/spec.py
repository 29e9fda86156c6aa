"""What an architecture is, as data. No torch: the front process reads it too.

A family (see `families/`) turns a checkpoint's config.json into a `ModelSpec`; one generic stack
(`transformer.py`) builds any spec. Fields are those that the stack implements: a field comes with
the code that honours it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

LAYER = "{layer}"  # stands for the number of a layer in a name


# ---- weights: from the checkpoint's names to ours ----


@dataclass(frozen=True, slots=True)
class Copy:
    """The checkpoint tensor of this name, as it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Transpose:
    """A matrix with its two dimensions exchanged (GPT-2's Conv1D stores [in, out])."""

    source: Source


@dataclass(frozen=True, slots=True)
class Cat:
    """Several tensors one after the other along `dim`, the i-th of them `sizes[i]` long there."""

    sources: tuple[Source, ...]
    sizes: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """Part `index` of a tensor that is cut along `dim` into pieces of `sizes`."""

    source: Source
    sizes: tuple[int, ...]
    index: int
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Interleave:
    """The first dimension read as [groups, outer, inner, rest] becomes [groups, inner, outer, rest].

    With outer = heads and inner = 3 it turns q, k, v stored head by head (GPT-NeoX) into all q,
    all k, all v; with groups = heads, outer = head_dim / 2 and inner = 2 it turns rotary pairs
    stored side by side (GPT-J) into halves.
    """

    source: Source
    outer: int
    inner: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Optional:
    """A tensor that a checkpoint may leave out: then one of `shape`, every value `fill`."""

    source: Source
    shape: tuple[int, ...]
    fill: float = 0.0


Source = Copy | Transpose | Cat | Split | Interleave | Optional


def names_of(source: Source) -> Iterator[str]:
    """The checkpoint names that a source reads, in order."""
    if isinstance(source, Copy):
        yield source.name
    elif isinstance(source, Cat):
        for part in source.sources:
            yield from names_of(part)
    else:
        yield from names_of(source.source)


def in_layer(source: Source, layer: int) -> Source:
    """The source with the number of a layer in its names."""
    if isinstance(source, Copy):
        return Copy(source.name.replace(LAYER, str(layer)))
    if isinstance(source, Cat):
        return Cat(tuple(in_layer(part, layer) for part in source.sources), source.sizes, source.dim)
    inner = in_layer(source.source, layer)
    if isinstance(source, Transpose):
        return Transpose(inner)
    if isinstance(source, Split):
        return Split(inner, source.sizes, source.index, source.dim)
    if isinstance(source, Interleave):
        return Interleave(inner, source.outer, source.inner, source.groups)
    return Optional(inner, source.shape, source.fill)


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Where each of our tensors comes from; a checkpoint must hold these tensors and no others.

    Attributes:
        tensors: our name to its source; names with `{layer}` stand for every layer.
        ignored: regular expressions of whole checkpoint names that hold no weight (mask buffers).
        duplicates: checkpoint name to another of which it may be a copy (a tied head that was
            saved all the same); the loader compares them.
        optional_prefix: begins the checkpoint's names, or not (GPT-2 was published both ways);
            all names here are without it.
        renames: (pattern, replacement) of old names, tried on the end of every checkpoint name
            (`.gamma` for `.weight`).
    """

    tensors: dict[str, Source] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = ()
    optional_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()

    def expanded(self, num_layers: int) -> dict[str, Source]:
        """`tensors` with every layer written out."""
        whole: dict[str, Source] = {}
        for name, source in self.tensors.items():
            if LAYER in name:
                for layer in range(num_layers):
                    whole[name.replace(LAYER, str(layer))] = in_layer(source, layer)
            else:
                whole[name] = source
        return whole


# ---- the architecture ----


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Normalization before attention, before the MLP and at the end.

    `kind` is "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016, with a bias).
    """

    kind: str
    eps: float


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A table of position embeddings, added to the token embeddings."""


@dataclass(frozen=True, slots=True)
class RopePositions:
    """Rotary positions (Su et al. 2021); halves of a head rotate against each other, as in Llama.

    `scaling` is "default", "linear" (frequencies divided by `factor`) or "llama3" (long wavelengths
    divided by `factor`, short ones kept, the rest between: Llama 3.1's reference code).
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder with its sizes: blocks of norm, attention, norm, MLP, each added to its input."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int  # the context, in tokens
    norm: NormSpec
    positions: LearnedPositions | RopePositions
    activation: str  # one of ACTIVATIONS
    gated: bool  # the MLP multiplies activation(gate) by up
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tied_head: bool  # the head's matrix is the token embedding's
    weights: WeightMap = field(repr=False)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Widths of q, k and v, which one product makes side by side."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache bytes of one token: a key and a value in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


# Names as in config.json; what each computes is in layers.py.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
