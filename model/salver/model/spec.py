"""What an architecture is, as data. No torch: the front reads it too.

A family (see `families/`) turns a checkpoint's config.json into a `ModelSpec`; one generic
stack (`transformer.py`) builds any spec. The fields are those that the stack implements;
a field comes with the code that honours it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), halves rotated against each other as in Llama.

    `scaling` is "default", "linear" (positions divided by `factor`) or "llama3" (long wavelengths
    divided by `factor`, as in Llama 3.1's published configuration).
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """A checkpoint tensor as it is. `{layer}` in the name is the layer's number."""

    name: str


@dataclass(frozen=True, slots=True)
class Transpose:
    """A matrix stored [in, out] (GPT-2's Conv1D) as [out, in]."""

    source: Source


@dataclass(frozen=True, slots=True)
class Cat:
    """Several tensors one after the other along the first dimension (q, k, v as one product)."""

    sources: tuple[Source, ...]


Source = Copy | Transpose | Cat


@dataclass(frozen=True, slots=True)
class WeightMap:
    """From our tensor names to those of the checkpoint.

    Attributes:
        tensors: our name to its source; names with `{layer}` stand for every layer.
        ignored: regular expressions of checkpoint names that hold no weight (old mask buffers).
        optional_prefix: begins the checkpoint's names, or not (GPT-2 was published both ways).
    """

    tensors: dict[str, Source] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    optional_prefix: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An architecture with its sizes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int  # the context, in tokens
    norm: str  # "rms" | "layer"; before attention, before the MLP and at the end
    norm_eps: float
    activation: str  # a key of layers.ACTIVATIONS
    gated: bool  # the MLP multiplies activation(gate) with up
    rope: RopeSpec | None  # None: learned absolute positions
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tied_head: bool
    weights: WeightMap
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_size(self) -> int:
        """Width of q, k and v side by side."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache bytes of one token: a key and a value in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value
