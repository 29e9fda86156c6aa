"""What is made of attention weights: means, rollouts, words in place of tokens, the strongest links."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from salver.model.tokenizer.encoding import EncodedText
from salver.server.tasks.scores import Array


def head_mean(weights: Array) -> Array:
    """[layers, 1, queries, keys] of [layers, heads, queries, keys]."""
    return np.asarray(weights.mean(axis=1, keepdims=True))


def rollout(weights: Array) -> Array:
    """[layers, 1, n, n] of all layers up to each of [layers, heads, n, n] (Abnar and Zuidema 2020).

    How much of each first token is in each row after the layer, where half of a row is what it was
    before (the residual) and half is what the heads' mean attends to.
    """
    found = np.empty((len(weights), 1, *weights.shape[2:]), dtype=np.float32)
    mixed = np.eye(weights.shape[-1])
    for layer, mean in enumerate(head_mean(weights)[:, 0]):
        row = 0.5 * mean.astype(np.float64) + 0.5 * np.eye(len(mean))
        mixed = (row / row.sum(axis=-1, keepdims=True)) @ mixed
        found[layer, 0] = mixed
    return found


def words_of(texts: Sequence[str], tokens: EncodedText) -> list[list[int]]:
    """The tokens of each word of a text or a pair in order. Special tokens stand alone.

    A word ends where the tokenizer says so, and at white space: not every tokenizer knows words.
    """
    words: list[list[int]] = []
    for place, source in enumerate(tokens.texts):
        last = words[-1][-1] if words else None
        if (
            last is None
            or source is None
            or tokens.texts[last] != source
            or _parted(texts[source], tokens, last, place)
        ):
            words.append([place])
        else:
            words[-1].append(place)
    return words


def _parted(text: str, tokens: EncodedText, last: int, place: int) -> bool:
    if tokens.words[last] != tokens.words[place]:
        return True
    start, end = tokens.offsets[place]
    between = text[tokens.offsets[last][1] : start]
    return any(c.isspace() for c in between) or text[start:end][:1].isspace()


def merged(weights: Array, queries: list[list[int]], keys: list[list[int]]) -> Array:
    """By words, of [..., queries, keys]: the mean over a word's queries, the sum over a word's keys.

    Rows that summed to 1 still do.
    """
    summed = np.add.reduceat(weights, [group[0] for group in keys], axis=-1)
    counts = np.array([len(group) for group in queries], dtype=weights.dtype)
    return np.asarray(np.add.reduceat(summed, [group[0] for group in queries], axis=-2) / counts[:, None])


def strongest(weights: Array, count: int) -> list[tuple[int, int, float]]:
    """(query, key, weight) of each query's `count` strongest keys, of [queries, keys], strongest first."""
    order = np.argsort(-weights, axis=-1, kind="stable")[:, :count]
    return [
        (query, int(key), float(weights[query, key]))
        for query, keys in enumerate(order)
        for key in keys
        if weights[query, key] > 0
    ]
