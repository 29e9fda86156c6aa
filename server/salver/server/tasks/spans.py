"""Token labels to spans of the text, as transformers' token-classification pipeline makes them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from salver.model.tokenizer.encoding import EncodedText
from salver.server.tasks.scores import Array

OUTSIDE = "O"


class Aggregation(enum.Enum):
    """How tokens' labels become spans."""

    NONE = "none"
    SIMPLE = "simple"
    FIRST = "first"
    AVERAGE = "average"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Span:
    """A label over text[start:end]."""

    label: str
    score: float
    start: int
    end: int


def labelled_spans(
    tokens: EncodedText, scores: Array, labels: Sequence[str], aggregation: Aggregation
) -> list[Span]:
    """Spans of the scores [n, labels] in order, those of the label O included."""
    places = [i for i, text in enumerate(tokens.texts) if text is not None]
    if aggregation in (Aggregation.NONE, Aggregation.SIMPLE):
        parts = [_span(tokens, [i], scores[i], labels) for i in places]
    else:
        parts = [_word(tokens, word, scores, labels, aggregation) for word in _words(tokens, places)]
    return parts if aggregation is Aggregation.NONE else _grouped(parts)


def _words(tokens: EncodedText, places: list[int]) -> list[list[int]]:
    words: list[list[int]] = []
    for i in places:
        if words and tokens.words[i] is not None and tokens.words[i] == tokens.words[words[-1][-1]]:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def _word(
    tokens: EncodedText, word: list[int], scores: Array, labels: Sequence[str], aggregation: Aggregation
) -> Span:
    rows = scores[word]
    if aggregation is Aggregation.FIRST:
        row = rows[0]
    elif aggregation is Aggregation.MAX:
        row = rows[int(rows.max(axis=1).argmax())]
    else:
        row = rows.mean(axis=0)
    return _span(tokens, word, row, labels)


def _span(tokens: EncodedText, places: list[int], row: Array, labels: Sequence[str]) -> Span:
    best = int(np.argmax(row))
    return Span(labels[best], float(row[best]), tokens.offsets[places[0]][0], tokens.offsets[places[-1]][1])


def _tag(label: str) -> tuple[str, str]:
    """B or I, and the label without it; what has no such mark goes on with what is before it."""
    if label.startswith(("B-", "I-")):
        return label[0], label[2:]
    return "I", label


def _grouped(parts: list[Span]) -> list[Span]:
    """Neighbours of one label make one span, unless a B says that another one begins."""
    groups: list[list[Span]] = []
    for part in parts:
        begins, label = _tag(part.label)
        if groups and begins != "B" and _tag(groups[-1][-1].label)[1] == label:
            groups[-1].append(part)
        else:
            groups.append([part])
    return [
        Span(
            _tag(group[0].label)[1],
            float(np.mean([part.score for part in group])),
            group[0].start,
            group[-1].end,
        )
        for group in groups
    ]
