"""What an encoder is, as data: the counterpart of `ModelSpec` for BERT and its family. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .spec import NormSpec, RopePositions, SinusoidalPositions, WeightMap


@dataclass(frozen=True, slots=True)
class PositionTable:
    """Learned position embeddings; the first token has row `offset`.

    RoBERTa counts only tokens other than padding: `padding_id`, where a text spells it, has row
    `offset - 1` and moves nobody on.
    """

    offset: int = 0
    padding_id: int | None = None


@dataclass(frozen=True, slots=True)
class RelativeBuckets:
    """A learned bias for each head and bucket of distances (T5, MPNet): one table, or `own` to each layer."""

    num_buckets: int
    max_distance: int
    own: bool = False


@dataclass(frozen=True, slots=True)
class Disentangled:
    """Scores of contents with distances, beside those of contents with contents (He et al. 2021, DeBERTa).

    Attributes:
        num_buckets: of distances, to either side; the table of their vectors has twice as many rows.
        max_distance: distances beyond half of the buckets share them by logarithm, up to this one; 0: each
            has a bucket of its own.
        content_to_position: a query's content meets keys of distances.
        position_to_content: a key's content meets queries of distances.
        shared: a layer makes both with its matrices of keys and queries, else with further ones.
        norm: of the table.
    """

    num_buckets: int
    max_distance: int
    content_to_position: bool
    position_to_content: bool
    shared: bool
    norm: NormSpec | None = None

    @property
    def kinds(self) -> int:
        """Of scores that are added."""
        return self.content_to_position + self.position_to_content


@dataclass(frozen=True, slots=True)
class ConvolutionSpec:
    """The first layer's output x becomes norm(x + activation(convolution of the embeddings))."""

    kernel_size: int  # odd
    activation: str


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What turns hidden states into a task's answer: dense, activation, norm, out.

    `reads` is "input" (one row of `labels` for all of it), "tokens" (one for each token), "spans" (two for
    each: start and end of an answer) or "vocabulary" (one for each token, over the vocabulary).
    An "input" head reads the first token, or the mean of all (`pooling` "cls" or "mean").
    """

    reads: str
    size: int  # of the output
    pooling: str = "cls"
    dense_size: int | None = None  # None: the output is of the hidden states as they are
    dense_bias: bool = True
    activation: str = "tanh"
    norm: NormSpec | None = None
    out_bias: bool = True
    tied: bool = False  # the output's matrix is the token embedding's


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A bidirectional stack: embeddings, then blocks of attention and MLP.

    A post-norm block computes x = norm(x + attention(x)); x = norm(x + mlp(x)), a pre-norm one
    x = x + attention(norm(x)); x = x + mlp(norm(x)).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int  # with weights of their own
    num_heads: int
    intermediate_size: int
    max_input_tokens: int
    norm: NormSpec
    activation: str  # one of ACTIVATIONS
    weights: WeightMap = field(repr=False)
    head: HeadSpec | None = None
    labels: tuple[str, ...] = ()
    problem_type: str = ""  # of the labels, as config.json says; empty where it says nothing
    rank_activation: str = (
        ""  # of a cross-encoder's score: identity, sigmoid; empty: sigmoid of a single label
    )
    embedding_size: int | None = None  # of the tables, where it is not hidden_size
    embedding_projection: bool = False  # from embedding_size to hidden_size
    embedding_multiplier: float = 1.0  # of the token embeddings
    embedding_norm: bool = True
    projection_first: bool = False  # before the norm of the embeddings, and without a bias
    num_segments: int = 0  # rows of the segment table; 0: there is none
    positions: PositionTable | None = None
    sinusoids: SinusoidalPositions | None = None  # computed rows in place of a learned table's
    rope: RopePositions | None = None
    local_rope: RopePositions | None = None  # of layers with a window; None: as `rope`
    buckets: RelativeBuckets | None = None
    disentangled: Disentangled | None = None
    convolution: ConvolutionSpec | None = None
    windows: tuple[int, ...] = ()  # of each layer: how far a token sees to either side, 0 for all; (): all
    layer_order: tuple[int, ...] = ()  # which layer's weights are used when (ALBERT); (): each once
    pre_norm: bool = False
    first_norm: bool = True  # a pre-norm stack's first attention has its norm
    final_norm: bool = False
    gated: bool = False
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    head_size: int | None = None  # of one head, where the heads don't share the hidden size
    attention_multiplier: float | None = None  # of the scores, in place of 1 / sqrt(head_dim)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def order(self) -> tuple[int, ...]:
        """The layers' weights in the order of their use."""
        return self.layer_order or tuple(range(self.num_layers))

    def window(self, step: int) -> int:
        """How far the layer that comes at `step` sees to either side; 0: everywhere."""
        return self.windows[step] if self.windows else 0
