"""One sequence that chooses its next token now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class SamplingRow:
    """Its parameters and its tokens so far. temperature 0 is greedy; the noise is that of
    (seed, sample_index, len(output_token_ids)). `banned_token_ids` cannot be chosen.

    bad_words: sequences of tokens that never become complete. allowed_words: the output is made of
    these sequences, one after the other, and `stop_token_ids` may follow a whole one.
    allowed_token_ids: nothing but these and `stop_token_ids`. All three are off when empty.
    no_repeat_ngram_size: no so many tokens occur twice in prompt and output; 0 is off.
    mask: uint8 [any length], a bit for each token, the lowest of a byte first, set where a grammar allows
    it; tokens beyond its end are not allowed.
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
    typical_p: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    stop_token_ids: Collection[int] = ()
    no_repeat_ngram_size: int = 0
    mask: npt.NDArray[np.uint8] | None = None
