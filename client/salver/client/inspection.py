"""What InspectionService answers, as plain frozen data, and its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from salver.client.convert import PromptLike, to_generation, to_prompt
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
    output_token_ids: Sequence[int]
    num_candidates: int
    priority: int
    request_id: str
    model: str
    timeout: float


def distribution_request(prompt: PromptLike, options: DistributionOptions) -> Any:
    """Raises TypeError for an option that does not exist."""
    return to_generation(inspection_pb2.GetDistributionRequest, options, prompt=to_prompt(prompt))


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
