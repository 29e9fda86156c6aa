"""Extractive question answering: windows over a long context, and spans by their start and end scores.

As transformers' question-answering pipeline scored them: start and end probabilities are over the
context's tokens and the first special token, which stands for "no answer".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from salver.model.tokenizer.encoding import EncodedText
from salver.server.tasks.scores import Array


@dataclass(frozen=True, slots=True)
class FoundAnswer:
    """context[start:end], or no answer where both are 0 and `no_answer` is set."""

    start: int
    end: int
    score: float
    no_answer: bool = False


def windows(tokens: EncodedText, limit: int, stride: int) -> list[EncodedText]:
    """The pair (question, context) in windows of at most `limit` tokens, overlapping by `stride`.

    Every window has the whole question. Raises ValueError where it leaves no room for more than `stride`.
    """
    context = [i for i, text in enumerate(tokens.texts) if text == 1]
    frame = len(tokens) - len(context)
    room = limit - frame
    if len(context) <= room:
        return [tokens]
    if room <= stride:
        raise ValueError(
            f"the question and special tokens are {frame} tokens and stride is {stride}; "
            f"of a window of {limit} that leaves nothing to go on by"
        )
    first, last = context[0], context[-1]
    before, after = list(range(first)), list(range(last + 1, len(tokens)))
    found = []
    for begin in range(0, len(context), room - stride):
        found.append(tokens.keep([*before, *context[begin : begin + room], *after]))
        if begin + room >= len(context):
            break
    return found


def best_answers(
    parts: Sequence[EncodedText],
    scores: Sequence[Array],
    *,
    count: int,
    max_tokens: int,
    allow_no_answer: bool,
) -> list[FoundAnswer]:
    """The best answers of all windows, by start and end logits [n, 2] of each; spans are whole words."""
    found: dict[tuple[int, int], float] = {}
    nothing = 1.0
    for tokens, logits in zip(parts, scores, strict=True):
        start, end = _probabilities(tokens, logits)
        nothing = min(nothing, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        table = np.triu(np.outer(start, end))
        table = np.tril(table, max_tokens - 1)
        places = np.argsort(-table, axis=None, kind="stable")[: 4 * count]
        for place in places:
            first, last = divmod(int(place), len(tokens))
            score = float(table[first, last])
            if score <= 0 or tokens.texts[first] != 1 or tokens.texts[last] != 1:
                continue
            span = _whole_words(tokens, first, last)
            found[span] = max(found.get(span, 0.0), score)  # overlapping windows find it twice
    answers = [FoundAnswer(start, end, score) for (start, end), score in found.items()]
    if allow_no_answer:
        answers.append(FoundAnswer(0, 0, nothing, no_answer=True))
    return sorted(answers, key=lambda answer: (-answer.score, answer.start, answer.end))[:count]


def _probabilities(tokens: EncodedText, logits: Array) -> tuple[Array, Array]:
    """Of being the start and the end, [n] each; 0 outside the context and the first token."""
    wide = logits.astype(np.float64)
    allowed = np.array([i == 0 or text == 1 for i, text in enumerate(tokens.texts)])
    wide[~allowed] = -np.inf
    exponents = np.exp(wide - wide.max(axis=0))
    both = exponents / exponents.sum(axis=0)
    return both[:, 0].copy(), both[:, 1].copy()


def _whole_words(tokens: EncodedText, first: int, last: int) -> tuple[int, int]:
    """(start, end) of the words that the tokens are parts of."""
    while first > 0 and tokens.texts[first - 1] == 1 and _one_word(tokens, first - 1, first):
        first -= 1
    while last + 1 < len(tokens) and tokens.texts[last + 1] == 1 and _one_word(tokens, last, last + 1):
        last += 1
    return tokens.offsets[first][0], tokens.offsets[last][1]


def _one_word(tokens: EncodedText, left: int, right: int) -> bool:
    return tokens.words[left] is not None and tokens.words[left] == tokens.words[right]
