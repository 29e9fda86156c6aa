"""What an architecture is, as data. No torch: the front process reads it too.

A family (see `families/`) turns a checkpoint's config.json into a `ModelSpec`; one generic stack
(`transformer.py`) builds any spec. Fields are those that the stack implements: a field comes with
the code that honours it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .encoder_spec import EncoderSpec

from .classifier_spec import ClassifierSpec

LAYER = "{layer}"  # stands for the number of a layer in a name


# ---- weights: from the checkpoint's names to ours ----


@dataclass(frozen=True, slots=True)
class Copy:
    """The checkpoint tensor of this name, as it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Transpose:
    """A matrix, or a stack of them, with its last dimensions exchanged (GPT-2's Conv1D stores [in, out])."""

    source: Source


@dataclass(frozen=True, slots=True)
class Cat:
    """Several tensors one after the other along `dim`, the i-th of them `sizes[i]` long there."""

    sources: tuple[Source, ...]
    sizes: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors of one shape along a new first dimension (a matrix for each expert)."""

    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Part `index` of a tensor that is cut along `dim` into pieces of `sizes`.

    With `groups` the dimension is that many runs of such pieces, and part `index` of each is taken:
    q of q, k, v stored head by head (GPT-NeoX) has groups = heads.
    """

    source: Source
    sizes: tuple[int, ...]
    index: int
    dim: int = 0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Interleave:
    """The first dimension read as [groups, outer, inner, rest] becomes [groups, inner, outer, rest].

    With outer = heads and inner = 3 it turns q, k, v stored head by head (GPT-NeoX) into all q,
    all k, all v; with groups = heads, outer = head_dim / 2 and inner = 2 it turns rotary pairs
    stored side by side (GPT-J) into halves. The first `lead` and the last `tail` rows of each group stay
    where they are. `dim` is the dimension meant, if not the first.
    """

    source: Source
    outer: int
    inner: int
    groups: int = 1
    lead: int = 0
    tail: int = 0
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Taps:
    """A convolution [out, in, size] as a product [out, size x in], the inputs of all places side by side."""

    source: Source
    size: int


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """4-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats 2023; GPT-OSS).

    `blocks` names uint8 [..., rows, columns / 32, 16], two values a byte, the first in its low half;
    `scales` uint8 [..., rows, columns / 32], exponents with a bias of 127.
    """

    blocks: str
    scales: str


@dataclass(frozen=True, slots=True)
class Optional:
    """A tensor that a checkpoint may leave out: then one of `shape`, every value `fill`."""

    source: Source
    shape: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class Either:
    """The first of several tensors that a checkpoint has: a tied matrix stands under one of its names."""

    sources: tuple[Copy, ...]


Source = Copy | Transpose | Cat | Stack | Split | Interleave | Taps | Mxfp4 | Optional | Either


def names_of(source: Source) -> Iterator[str]:
    """The checkpoint names that a source reads, in order."""
    if isinstance(source, Copy):
        yield source.name
    elif isinstance(source, Mxfp4):
        yield from (source.blocks, source.scales)
    elif isinstance(source, Cat | Stack | Either):
        for part in source.sources:
            yield from names_of(part)
    else:
        yield from names_of(source.source)


def in_layer(source: Source, layer: int) -> Source:
    """The source with the number of a layer in its names."""
    if isinstance(source, Copy):
        return Copy(source.name.replace(LAYER, str(layer)))
    if isinstance(source, Mxfp4):
        return Mxfp4(source.blocks.replace(LAYER, str(layer)), source.scales.replace(LAYER, str(layer)))
    if isinstance(source, Either):
        return Either(tuple(Copy(copy.name.replace(LAYER, str(layer))) for copy in source.sources))
    if isinstance(source, Cat | Stack):
        return replace(source, sources=tuple(in_layer(part, layer) for part in source.sources))
    return replace(source, source=in_layer(source.source, layer))


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Where each of our tensors comes from; a checkpoint must hold these tensors and no others.

    Attributes:
        tensors: our name to its source; names with `{layer}` stand for every layer.
        layers: for those of such names that stand for some layers alone, which.
        ignored: regular expressions of whole checkpoint names that hold no weight (mask buffers).
        duplicates: checkpoint name to another of which it may be a copy (a tied head that was
            saved all the same); the loader compares them.
        optional_prefix: begins the checkpoint's names, or not (GPT-2 was published both ways);
            all names here are without it.
        renames: (pattern, replacement) of old names, tried on the end of every checkpoint name
            (`.gamma` for `.weight`).
        modules: of tensors whose parts are modules of their own elsewhere, as in another version of
            transformers, a source under those names. Adapters may bear them, checkpoints may not.
    """

    tensors: dict[str, Source] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = ()
    optional_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: dict[str, Source] = field(default_factory=dict)

    def expanded(self, num_layers: int) -> dict[str, Source]:
        """`tensors` with every layer written out."""
        return self._written_out(self.tensors, num_layers)

    def expanded_modules(self, num_layers: int) -> dict[str, Source]:
        """`modules` with every layer written out."""
        return self._written_out(self.modules, num_layers)

    def _written_out(self, sources: dict[str, Source], num_layers: int) -> dict[str, Source]:
        whole: dict[str, Source] = {}
        for name, source in sources.items():
            if LAYER in name:
                for layer in self.layers.get(name, range(num_layers)):
                    whole[name.replace(LAYER, str(layer))] = in_layer(source, layer)
            else:
                whole[name] = source
        return whole


# ---- the architecture ----


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Normalization: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016).

    Attributes:
        weight: it has weights (OLMo's has none).
        bias: it has a bias; of the kind "layer" alone.
        offset: added to the weights (Gemma stores what they differ from 1 by).
    """

    kind: str
    eps: float
    weight: bool = True
    bias: bool = True
    offset: float = 0.0

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer" and self.weight and self.bias


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Normalization of queries and keys before their rotation.

    `scope` is "head" (each head by itself, one vector of weights for all), "heads" (each head by
    itself, with weights of its own) or "all" (all heads as one vector).
    """

    norm: NormSpec
    scope: str


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A table of position embeddings, added to the token embeddings; position p is row p + `offset`."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class SinusoidalPositions:
    """Computed position embeddings (Vaswani et al. 2017), all sines before all cosines.

    Position p is row p + `offset` of the table; the row `zero` is zeros (a padding token's, in fairseq).
    The longest of the n wavelengths is 10000 times the shortest, or with `open_end` the n + 1st would be,
    as in the paper.
    """

    offset: int = 0
    zero: int | None = None
    open_end: bool = False


@dataclass(frozen=True, slots=True)
class AlibiPositions:
    """Scores get slope x key position (Press et al. 2021), a slope for each query head.

    `multiplier` times that; `rounded`: slope, position and product in bfloat16 (Falcon).
    """

    slopes: tuple[float, ...]
    multiplier: float = 1.0
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class BucketPositions:
    """Scores get a learned bias for each query head and bucket of distances (T5, Raffel et al. 2020).

    Near distances have a bucket each, far ones share theirs by logarithm, up to `max_distance`. The table
    is one for all layers, or `own` to each.
    """

    num_buckets: int
    max_distance: int
    own: bool = False


@dataclass(frozen=True, slots=True)
class RopePositions:
    """Rotary positions (Su et al. 2021); halves of a head rotate against each other, as in Llama.

    Attributes:
        theta: base of the wavelengths.
        scaling: "default"; "linear" (frequencies divided by `factor`); "dynamic" (theta grows with the
            sequence once it is longer than `original_max_position_embeddings`); "yarn" (Peng et al.
            2023); "longrope" (Ding et al. 2024: `long_factors` for sequences beyond the original
            context, else `short_factors`); "llama3" (long wavelengths divided by `factor`, short ones
            kept, the rest between).
        rotary_dim: the first so many values of a head rotate; 0 for all.
        attention_factor: cosines and sines are multiplied by it (yarn, longrope).
        beta_fast, beta_slow, truncate: of yarn, where its ramp lies, and whether on whole dimensions.
        recomputed: of longrope: a sequence that grows beyond the original context is computed again.
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    rotary_dim: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    recomputed: bool = False

    @property
    def grows(self) -> bool:
        """Whether the angle of a position depends on the length of its sequence too."""
        return self.scaling in ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017): the weighted sum of a token's best few.

    Attributes:
        count, per_token: experts of a layer, and how many of them compute a token.
        intermediate_size: of one expert.
        scores: "softmax" over all experts, or "sigmoid" of each.
        normalized: the chosen experts' weights are divided by their sum.
        scale: and multiplied by this.
        correction: a bias is added to the scores for the choice, not for the weights (DeepSeek-V3).
        groups, groups_per_token: the choice is among the experts of the best groups, judged by the sum
            of their two best scores.
        bias: the router and the experts have biases.
        shared_intermediate_size: of a further MLP that computes every token; 0 for none.
        shared_gate: its output is multiplied by the sigmoid of a product with the token.
    """

    count: int
    per_token: int
    intermediate_size: int
    scores: str = "softmax"
    normalized: bool = False
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    groups_per_token: int = 1
    bias: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Keys and values as one low-rank vector a token (DeepSeek-V2): what the cache holds is that vector.

    Attributes:
        norm: of that vector.
        query_rank: queries come through a vector of this size too, with such a norm; 0: they don't.
        latent_dim: size of the vector, from which keys and values of all heads are made.
        rotary_dim: of a key that all heads share, beside it.
        key_dim, value_dim: of one head, without the rotary part.
    """

    norm: NormSpec
    query_rank: int
    latent_dim: int
    rotary_dim: int
    key_dim: int
    value_dim: int


Positions = LearnedPositions | SinusoidalPositions | AlibiPositions | BucketPositions | RopePositions


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: its sizes, and how its layers are made. Defaults are those of a Llama or GPT-2 block.

    Attributes:
        num_kv_heads, head_dim: as the cache stores them.
        max_position_embeddings: the context, in tokens.
        norm_place: "pre": x + f(norm(x)); "output": x + norm(f(x)); "sandwich": x + norm(f(norm(x)));
            "post": norm(x + f(x)), without a norm at the end.
        parallel: attention and MLP read the same x: x + attention(norm(x)) + mlp(norm(x)).
        shared_norm: and the same norm of it.
        gated: the MLP multiplies activation(gate) by up.
        up_limit: gate and up are clamped to this, and the product is (up + 1) gate sigmoid(1.702 gate)
            (GPT-OSS); 0 for none.
        windows: of each layer, how many last positions a query sees, itself included; None: all. () for
            none in any layer.
        ropes: of each layer, its rotary positions, None for none. () for `positions` in all.
        expert_layers: which layers have `experts`; the others have an MLP.
        attention_multiplier: what scores are multiplied by, in place of 1 / sqrt(head_dim).
        score_cap, logit_cap: c tanh(x / c) of scores and of logits.
        sinks: every head has a score that takes its part in the softmax and adds no value.
        qkv_clip: queries, keys and values are clamped to this.
        embedding_size: of the token embeddings, where it differs from `hidden_size`.
        embedding_multiplier, residual_multiplier, logit_multiplier: of the token embeddings, of what
            each block adds, and of the logits.
        tied_head: the head's matrix is the token embedding's.
        logit_bias: a bias is added to the logits, which a tied head may have too.
        encoder: of an encoder-decoder: it reads the source, and every layer here attends to its last
            hidden states between attention and MLP, in the same shape of heads.
        own_embedding: encoder and decoder have an embedding each.
        cross_bias: the products of that attention have biases.
        decoder_start_token_id, forced_bos_token_id: what an encoder-decoder's output begins with; the
            second, where there is one, after the first.
        forced_eos_token_id: what it ends with where it reaches its limit.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm: NormSpec
    positions: Positions
    activation: str  # one of ACTIVATIONS
    gated: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tied_head: bool
    weights: WeightMap = field(default_factory=WeightMap, repr=False)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    body: bool = False  # without a language model's head: nothing is generated
    classifier: ClassifierSpec | None = None
    # How a family may differ. The native kernel knows none of these but where it says so.
    norm_place: str = "pre"
    parallel: bool = False
    shared_norm: bool = False
    head_norm: HeadNorm | None = None
    embedding_norm: NormSpec | None = None
    final_norm: bool = True
    head_bias: bool = False
    up_limit: float = 0.0
    windows: tuple[int | None, ...] = ()
    ropes: tuple[RopePositions | None, ...] = ()
    experts: ExpertsSpec | None = None
    expert_layers: tuple[int, ...] = ()
    latent: LatentAttention | None = None
    attention_multiplier: float | None = None
    score_cap: float = 0.0
    logit_cap: float = 0.0
    sinks: bool = False
    qkv_clip: float = 0.0
    embedding_size: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_bias: bool = False
    encoder: EncoderSpec | None = None
    own_embedding: bool = False
    cross_bias: bool = True
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None

    @property
    def output_start(self) -> tuple[int, ...]:
        """What an encoder-decoder's output begins with, before any token is chosen."""
        start = (self.decoder_start_token_id, self.forced_bos_token_id)
        return tuple(token_id for token_id in start if token_id is not None)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Widths of q, k and v, which one product makes side by side."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def window(self, layer: int) -> int | None:
        """How many last positions a query of the layer sees, itself included; None: all."""
        return self.windows[layer] if self.windows else None

    def rope(self, layer: int) -> RopePositions | None:
        """The layer's rotary positions, if it has some."""
        if self.ropes:
            return self.ropes[layer]
        return self.positions if isinstance(self.positions, RopePositions) else None

    @property
    def rope_context(self) -> tuple[int, str]:
        """For ropes that grow: up to which length of a prompt they don't, and what is beyond.

        "each": every length has angles of its own; "long": all have the same; "again": they do, and a
        sequence that grows beyond is computed again with them. (0, "") where no rope grows.
        """
        kinds = [
            rope for rope in (*self.ropes, self.positions) if isinstance(rope, RopePositions) and rope.grows
        ]
        if not kinds:
            return 0, ""
        original = min(rope.original_max_position_embeddings for rope in kinds)
        if any(rope.scaling == "dynamic" for rope in kinds):
            return original, "each"
        return original, "again" if any(rope.recomputed for rope in kinds) else "long"

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache bytes of one token: a key and a value in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def differences(self) -> Iterator[str]:
        """Names of the fields in which this differs from a Llama or GPT-2 block."""
        for described in fields(self):
            value, usual = getattr(self, described.name), described.default
            if usual is not MISSING and value != usual and "token_id" not in described.name:
                yield described.name


# Names as in config.json; what each computes is in layers.py.
ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "quick_gelu",
    "relu", "relu2",
)  # fmt: skip
