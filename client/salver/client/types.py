"""What the client returns and takes: plain frozen data, no protobuf."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from salver.client.explanation import Explanation


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Role(enum.Enum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model calls; `arguments` is JSON. In a stream, what was added to it."""

    name: str
    arguments: str
    id: str = ""
    index: int = 0

    def parsed(self) -> Any:
        """The arguments as Python values. Raises ValueError for those that were cut."""
        return json.loads(self.arguments)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @classmethod
    def user(cls, content: str) -> Message:
        return cls(Role.USER, content)

    @classmethod
    def system(cls, content: str) -> Message:
        return cls(Role.SYSTEM, content)

    @classmethod
    def assistant(cls, content: str, tool_calls: Sequence[ToolCall] = ()) -> Message:
        return cls(Role.ASSISTANT, content, tool_calls=tuple(tool_calls))

    @classmethod
    def tool(cls, call: ToolCall, content: str) -> Message:
        """What a tool answers to a call."""
        return cls(Role.TOOL, content, call.name, tool_call_id=call.id)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What ended a completion whose finish reason is STOP: exactly one of the three is set."""

    text: str | None = None
    token_id: int | None = None
    eos: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the most probable tokens at a position."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (None for the first prompt token) and rank (1 is the best).

    `named` are the tokens of `logprob_token_ids`, in their order.
    """

    token_id: int
    token: bytes
    logprob: float | None
    rank: int
    top: tuple[Candidate, ...] = ()
    named: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample; in a stream, what was added to it, starting at the offsets (code points, tokens).

    With tools or separate_reasoning, content, reasoning and tool_calls are what `text` says.
    `score` is that of a beam search.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: StopMatch | None = None
    text_offset: int = 0
    token_offset: int = 0
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    score: float | None = None


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Asks for the `n` best answers of a beam search; None is the checkpoint's or the server's default.

    Scores are divided by (output tokens)**length_penalty. early_stopping: when the search ends, once it
    has num_beams answers: at once (True), when better ones are unlikely (False), or impossible ("never").
    """

    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    resumed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by phase, as the server measured them; steps and preemptions are counts."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: int = 0
    preemptions: int = 0


class Origin(enum.Enum):
    """Who said a value of the configuration: the request, generation_config.json, or the server's default."""

    REQUEST = "request"
    CHECKPOINT = "checkpoint"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of the configuration in force, and where it came from."""

    value: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A whole answer; in a stream, one message of it.

    `configuration` is what the request was answered with, by name; in a stream, in the first message.
    `weights_version` rises with every update of the server's weights (docs/weights.md).
    """

    request_id: str
    model: str
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    seed: int = 0
    numerics_id: str = ""
    prompt_token_ids: tuple[int, ...] = ()
    configuration: Mapping[str, Setting] = field(default_factory=dict)
    weights_version: int = 0
    explanation: Explanation | None = None  # of a call with `explain`; in a stream, in the last message

    @property
    def text(self) -> str:
        """The text of the first sample ("" in a stream's message that adds nothing to it)."""
        return next((c.text for c in self.completions if c.index == 0), "")


@dataclass(frozen=True, slots=True)
class Resume:
    """The tokens so far of a stream that was cut; made by a stream's `resume()`."""

    samples: Mapping[int, Sequence[int]]
    seed: int
    numerics_id: str = ""
    prompt_token_ids: Sequence[int] = ()
    allow_numerics_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """The log-likelihood of one continuation."""

    logprobs: tuple[TokenLogprob, ...]
    sum: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text, with its place in code points."""

    id: int
    token: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Model:
    """What is served. `base` is set for an adapter: the model that it belongs to."""

    name: str
    architecture: str
    tasks: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    num_parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    weights_digest: str
    quantization: str
    base: str = ""
    embedding_dimensions: int | None = None
    labels: tuple[str, ...] = ()
    weights_version: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that a request must keep."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    max_message_bytes: int
    kv_cache_tokens: int
    max_samples: int
    max_top_logprobs: int
    max_beams: int = 0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server itself. Durations in seconds; start-up phases by name, in order."""

    version: str
    limits: Limits
    drain_period: float
    numerics_id: str
    device: str
    torch_version: str
    startup_phases: dict[str, float] = field(default_factory=dict)
    worker_restarts: int = 0
    weights_version: int = 0


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of every generating call; what is left out is the server's default.

    `timeout` is in seconds, `logprobs` and `prompt_logprobs` say how many of the most probable
    tokens to return at each position (0: the chosen one alone), `logprob_token_ids` which others.
    `beams` asks for a beam search, of so many beams or as a `BeamParams`; it cannot be streamed.
    `json_schema` (a mapping, or its text), `json_object`, `regex`, `grammar` and `choice` say what the
    text must be; at most one of them. What each option does is said in docs/generation.md.
    `target_language` and `source_language` are of a translation model (docs/models.md), and of no chat.
    """

    temperature: float
    top_p: float
    min_p: float
    typical_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    n: int
    seed: int
    logit_bias: Mapping[int, float]
    no_repeat_ngram_size: int
    bad_words: Sequence[str]
    allowed_words: Sequence[str]
    bad_token_sequences: Sequence[Sequence[int]]
    allowed_token_ids: Sequence[int]
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    logprobs: int
    prompt_logprobs: int
    logprob_token_ids: Sequence[int]
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]
    beams: int | BeamParams
    priority: int
    cache_salt: str
    target_language: str
    source_language: str
    resume: Resume
    explain: bool
    request_id: str
    model: str
    timeout: float


class ChatOptions(GenerationOptions, total=False):
    """What a chat takes besides. `tool_choice` is "auto", "none", "required" or a tool's name."""

    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, Any]
    tools: Sequence[Tool]
    tool_choice: str
    separate_reasoning: bool


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of `score`."""

    top_k: int
    priority: int
    target_language: str
    source_language: str
    request_id: str
    model: str
    timeout: float
