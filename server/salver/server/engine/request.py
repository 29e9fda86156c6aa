"""What goes into the engine and what comes out of it: plain data, standard library only.

The front makes an `EngineRequest` (integers and frozen parameters, no text) and
sends it through the pipe; the worker answers with one `StepMessage` per step.
Everything here is pickled between the two processes, which are of one version.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from salver.server.engine.changes import AdapterFacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from salver.model.arithmetic import LoadedTensor, Roofline
    from salver.server.engine.accounting import Account

NO_DEADLINE = float("inf")


class FinishReason(enum.Enum):
    """Why a sequence ended. The front adds stop strings, which the engine does not know."""

    STOP = "stop"  # an end-of-sequence token or a stop token id
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"  # the front asked for it, or the request's own parameters leave no token to choose
    DEADLINE = "deadline"  # its deadline passed, queued or running
    ERROR = "error"  # its computation failed (NaN); the others went on
    MEMORY = "memory"  # its part of a step alone is more than the memory holds; the others went on


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; defaults switch each step off. temperature 0 is greedy.

    What bad_words, allowed_words, allowed_token_ids and no_repeat_ngram_size mean is said in
    `salver.model.sampling.SamplingRow`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    typical_p: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a sequence ends. `stop_token_ids` holds the end-of-sequence ids too, unless ignored.

    Before `min_tokens` output tokens, a stop token id cannot be chosen: its logit is masked.
    """

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    forced_eos_token_id: int | None = None  # is chosen where an output reaches max_tokens


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Asks for the best answers of a beam search (`beam`) in place of samples.

    A score is divided by (output tokens)^length_penalty. early_stopping: True, False or "never".
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False


class Readout(enum.Enum):
    """What is read of a computed input in place of sampled tokens: float32 arrays, n the input's tokens."""

    TOKENS = "tokens"  # the last hidden states [n, hidden_size]
    EMBEDDING = "embedding"  # pooled, and through the checkpoint's dense modules [dimensions]
    SCORES = "scores"  # the head's: [labels], or [n, labels] of a head that reads every token
    CANDIDATES = "candidates"  # the vocabulary head's most probable tokens at some positions
    ATTENTION = "attention"  # the weights of some layers and heads [layers, heads, queries, keys]
    DISTRIBUTION = "distribution"  # the next token's, before and after each step of sampling


class AttentionOf(enum.Enum):
    """Which attention of an encoder-decoder; all others have OWN alone."""

    OWN = "own"  # of the prompt's tokens to one another
    SOURCE = "source"  # of the source's tokens to one another, in the encoder
    CROSS = "cross"  # of the prompt's tokens to the source's


@dataclass(frozen=True, slots=True)
class EncodingParams:
    """Asks for arrays in place of tokens.

    A `whole` input is computed in one step and leaves nothing in the cache: every token attends to
    every other. Others are prompts like any, computed in chunks. `segments` is one id per token, or
    empty where all are 0; `pooling` the names of `salver.model.pooling` that make an EMBEDDING.

    CANDIDATES of m `positions` are three arrays: token ids int64 [m, top_k], most probable first, their
    log-probabilities [m, top_k], and those of the `targets` [m, len(targets)].
    DISTRIBUTION is of the request's sampling and stopping, s steps: names str [s], token ids int64
    [s, top_k], most probable first and -1 for none, their probabilities float64 [s, top_k], tokens that can
    be chosen int64 [s], and float64 [s, 2]: removed mass and entropy. See `salver.model.sampling`.
    """

    readout: Readout
    whole: bool = False
    segments: tuple[int, ...] = ()
    pooling: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    top_k: int = 0
    targets: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()  # of ATTENTION, in rising order
    heads: tuple[int, ...] = ()
    attention_of: AttentionOf = AttentionOf.OWN


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt and `len(outputs)` samples of its continuation.

    `outputs[i]` are the tokens that sample `sample_indices[i]` has already (resumed, or
    from before the worker died); usually empty. They count as output for penalties,
    limits and noise positions. A request with `max_tokens` 0 computes its prompt only
    (Score, and everything with `encoding`). Times are of the monotonic clock, which both processes share.

    With `beams` the samples are the answers, sample 0 the best: they come whole, when the search has
    ended, and begin anew where it is cut (`outputs` are empty).
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]  # of an encoder-decoder, what its output begins with
    sampling: SamplingParams
    stopping: StoppingParams
    sample_indices: tuple[int, ...] = (0,)
    outputs: tuple[tuple[int, ...], ...] = ((),)
    output_top_k: int | None = None  # log-probabilities of output tokens: 0 the chosen alone
    logprob_token_ids: tuple[int, ...] = ()  # and of these tokens, with the output's
    prompt_top_k: int | None = None
    prompt_logprobs_start: int = 0  # first prompt position whose log-probability is wanted
    priority: int = 0
    deadline: float = NO_DEADLINE
    arrival: float = 0.0
    cache_salt: str = ""
    tenant: str = ""  # whose it is; tenants share the engine by their weights
    weight: float = 1.0
    encoding: EncodingParams | None = None
    adapter: str = ""  # the key of the LoRA adapter that is asked (see `changes`); empty: the model itself
    source_token_ids: tuple[int, ...] = ()  # what an encoder-decoder's encoder reads
    num_start_tokens: int = 0  # of the prompt, that came with no text but from the checkpoint
    grammar: str = ""  # that the output's text must follow, as the front compiled it; empty: none
    beams: BeamParams | None = None
    explain: bool = False  # its outputs carry its account (see `accounting`)
    submitted: float = 0.0  # of `explain`: when the front gave it to this worker

    @property
    def num_places(self) -> int:
        """Sequences that it may have in the batch at once."""
        return len(self.sample_indices) if self.beams is None else self.beams.num_beams

    @property
    def num_input_tokens(self) -> int:
        """Tokens of its texts: the source's, and the prompt's without what the checkpoint begins it with."""
        return len(self.source_token_ids) + len(self.prompt_token_ids) - self.num_start_tokens


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position, of the raw logits. `top` is sorted, most probable first.

    `named` are those of the request's logprob_token_ids, in their order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
    named: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class SequenceTimings:
    """Seconds (durations) and counts of one sequence, filled when it ends."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class SequenceOutput:
    """What one step added to one sample of a request."""

    request_id: int
    sample_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None  # one per token, when asked for
    prompt_logprobs: list[Logprobs] | None = None  # of positions in order, as chunks are computed
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    timings: SequenceTimings | None = None  # set when it ends
    error: str = ""
    arrays: tuple[NDArray[Any], ...] = ()  # what `encoding` asked for, when it ends
    score: float | None = None  # of an answer of a beam search
    computing: bool = False  # nothing to tell yet, but that computing the request goes well
    account: Account | None = None  # of a request with `explain`, as it is after this step


@dataclass(slots=True)
class StepStats:
    """One step, for the metrics. Seconds."""

    num_tokens: int
    num_sequences: int
    duration: float
    model_duration: float  # of it, inside the model's forward pass
    num_prefill_tokens: int = 0  # tokens beside the newest of each sequence and its drafts
    tenants: tuple[tuple[str, int], ...] = ()  # nanoseconds of `duration` that are each tenant's


@dataclass(slots=True)
class StepMessage:
    """Worker to front: all that one step produced."""

    outputs: list[SequenceOutput]
    started: list[tuple[int, float]]  # request ids first scheduled in this step, seconds they waited
    stats: StepStats | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the worker knows of its model and its device, for the model card.

    Speeds are of the warm-up, in tokens a second: of one prompt, and of one sequence that decodes at the
    begin of its context (0 of an encoder).
    """

    tensors: tuple[LoadedTensor, ...]
    weight_bytes: int  # of the storages that hold the weights
    roofline: Roofline
    prefill_speed: float
    decode_speed: float


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to front: the model is loaded and warm."""

    device: str  # "cpu" or "cuda:0 NVIDIA H100 ..."
    dtype: str
    kernels: str  # "native", or "torch" and why
    torch_version: str
    numerics_id: str
    num_parameters: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    phases: tuple[tuple[str, float], ...]  # start-up phases in order, seconds
    quantization: str = "none"  # of the weights: none | int8 | int4
    fixed_rows: int = 0  # of every product on a GPU; see `numerics.numerics_id`
    adapters: tuple[AdapterFacts, ...] = ()
    lost_adapters: tuple[tuple[str, str], ...] = ()  # keys of what the last worker had, and why not this one
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker to front: it cannot start, and why (for a person, naming flag, file or tensor)."""

    message: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Front to worker."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """Front to worker: free everything that the request (or one sample of it) holds, within a step."""

    request_id: int
    sample_index: int | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Front to worker: end now."""
