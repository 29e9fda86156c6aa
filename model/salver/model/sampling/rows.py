"""One sequence that chooses its next token now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class SamplingRow:
    """Its parameters and its tokens so far. temperature 0 is greedy; the noise is that of
    (seed, sample_index, len(output_token_ids)). `banned_token_ids` cannot be chosen.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int
    sample_index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    banned_token_ids: Collection[int] = ()
