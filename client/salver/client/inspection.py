"""What InspectionService answers, as plain frozen data, and its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from salver.client.convert import PromptLike, to_generation, to_messages, to_prompt
from salver.client.types import Message
from salver.v1 import inspection_pb2


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """A token, its bytes and its probability."""

    token_id: int
    token: bytes
    probability: float


@dataclass(frozen=True, slots=True)
class StepDistribution:
    """The next token's distribution after a step of sampling (`model`: before the first).

    candidates: most probable first. num_tokens: those that can be chosen. removed_mass: the probability,
    before the step, of those that it made impossible. entropy: in nats.
    """

    step: str
    candidates: tuple[TokenProbability, ...]
    num_tokens: int
    removed_mass: float
    entropy: float


class DistributionOptions(TypedDict, total=False):
    """Keyword arguments of `get_distribution`: those of generation that decide about one token, and

    `num_candidates` to return of each step, and `output_token_ids` that the model has written already.
    Of a conversation also what `chat` takes of its template.
    """

    temperature: float
    top_p: float
    min_p: float
    typical_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    no_repeat_ngram_size: int
    bad_words: Sequence[str]
    allowed_words: Sequence[str]
    bad_token_sequences: Sequence[Sequence[int]]
    allowed_token_ids: Sequence[int]
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, Any]
    output_token_ids: Sequence[int]
    target_language: str
    source_language: str
    num_candidates: int
    priority: int
    request_id: str
    model: str
    timeout: float


@dataclass(frozen=True, slots=True)
class AttentionUnit:
    """A token, or a word of several, and its place (code points) in its text: 0, or 1 for pair or target."""

    token_ids: tuple[int, ...]
    token: bytes
    start: int
    end: int
    text: int = 0


@dataclass(frozen=True, slots=True)
class AttentionLink:
    """How much a query's unit attends to a key's."""

    query: int
    key: int
    weight: float


@dataclass(frozen=True, slots=True)
class AttentionMatrix:
    """Of a layer and a head (None: their mean, or a rollout): a row of `weights` for each query.

    With `top_k` there are `links` instead, of each query the strongest first.
    """

    layer: int
    head: int | None
    weights: tuple[tuple[float, ...], ...]
    links: tuple[AttentionLink, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """The units, the matrices that were asked for, and how many layers and heads the model has.

    Columns are of `units`, rows of `queries`: the same, but for cross-attention the target's.
    """

    units: tuple[AttentionUnit, ...]
    matrices: tuple[AttentionMatrix, ...]
    num_layers: int
    num_heads: int
    truncated_tokens: int
    queries: tuple[AttentionUnit, ...]


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `get_attention`. `view` is raw, head_mean or rollout; `pair` a second text.

    Of an encoder-decoder, `kind` is encoder, decoder or cross, and `target` what it writes.
    """

    pair: str
    kind: str
    target: PromptLike
    target_language: str
    source_language: str
    layers: Sequence[int]
    heads: Sequence[int]
    view: str
    top_k: int
    merge_words: bool
    truncate: bool
    priority: int
    request_id: str
    model: str
    timeout: float


def attention_request(prompt: PromptLike, options: AttentionOptions) -> Any:
    """Raises TypeError for a view or a kind that does not exist."""
    fields: Any = {name: value for name, value in options.items() if name != "timeout" and value is not None}
    for field, names in (("view", inspection_pb2.AttentionView), ("kind", inspection_pb2.AttentionKind)):
        if field in fields:
            name = f"ATTENTION_{field.upper()}_{str(fields[field]).upper()}"
            if name not in names.keys():  # noqa: SIM118 - it is no mapping
                raise TypeError(f"{field} {fields[field]!r} does not exist")
            fields[field] = name
    if "target" in fields:
        fields["target"] = to_prompt(fields["target"])
    return inspection_pb2.GetAttentionRequest(prompt=to_prompt(prompt), **fields)


def attention(reply: Any) -> Attention:
    size = len(reply.units)
    units, queries = (
        tuple(AttentionUnit(tuple(u.token_ids), u.token, u.start, u.end, u.text) for u in side)
        for side in (reply.units, reply.queries)
    )
    return Attention(
        units,
        tuple(
            AttentionMatrix(
                m.layer,
                m.head if m.HasField("head") else None,
                tuple(tuple(m.weights[i : i + size]) for i in range(0, len(m.weights), size)),
                tuple(AttentionLink(link.query, link.key, link.weight) for link in m.links),
            )
            for m in reply.matrices
        ),
        reply.num_layers,
        reply.num_heads,
        reply.truncated_tokens,
        queries or units,
    )


def distribution_request(prompt: PromptLike | Sequence[Message], options: DistributionOptions) -> Any:
    """Of a prompt or a conversation. Raises TypeError for an option that does not exist."""
    if not isinstance(prompt, str) and any(isinstance(item, Message) for item in prompt):
        said: Any = {"messages": to_messages(prompt)}  # type: ignore[arg-type]
    else:
        said = {"prompt": to_prompt(prompt)}  # type: ignore[arg-type]
    return to_generation(inspection_pb2.GetDistributionRequest, options, **said)


def distribution(reply: Any) -> list[StepDistribution]:
    return [
        StepDistribution(
            inspection_pb2.SamplingStep.Name(step.step).removeprefix("SAMPLING_STEP_").lower(),
            tuple(TokenProbability(c.token_id, c.token, c.probability) for c in step.candidates),
            step.num_tokens,
            step.removed_mass,
            step.entropy,
        )
        for step in reply.steps
    ]
