"""Which tokens the tokens so far rule out, or allow. Pure functions of the sequence; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache


def ends_of_ngrams(token_ids: Sequence[int], size: int) -> set[int]:
    """The tokens that would complete an n-gram (of `size` tokens) which is there already.

    As transformers' NoRepeatNGramLogitsProcessor.
    """
    if len(token_ids) + 1 < size:
        return set()
    if size == 1:
        return set(token_ids)
    tokens = list(token_ids)
    beginning = tokens[len(tokens) - size + 1 :]
    found: set[int] = set()
    # `index` finds the places of the beginning's last token much faster than a loop would.
    place = size - 3
    try:
        while True:
            place = tokens.index(beginning[-1], place + 1, len(tokens) - 1)
            if tokens[place - size + 2 : place + 1] == beginning:
                found.add(tokens[place + 1])
    except ValueError:
        return found


def ends_of_bad_words(token_ids: Sequence[int], words: Iterable[tuple[int, ...]]) -> set[int]:
    """The tokens that would complete one of the words, as transformers' NoBadWordsLogitsProcessor."""
    return {
        word[-1]
        for word in words
        if len(word) == 1
        or (len(word) <= len(token_ids) + 1 and tuple(token_ids[1 - len(word) :]) == word[:-1])
    }


def allowed_next(token_ids: Sequence[int], words: tuple[tuple[int, ...], ...]) -> tuple[set[int], bool]:
    """What may follow when the whole sequence is made of words: tokens, and whether it is whole words now.

    A sequence may be read in several ways (a word can be the beginning of another): all count.
    Nothing may follow a sequence that is not made of the words.
    """
    starts = _by_first_token(words)
    inside: list[tuple[tuple[int, ...], int]] = []  # words, and how many of their tokens are there
    whole = True
    for token_id in token_ids:
        moved = [(word, at + 1) for word, at in inside if word[at] == token_id]
        if whole:
            moved += [(word, 1) for word in starts.get(token_id, ())]
        whole = any(at == len(word) for word, at in moved)
        inside = list(dict.fromkeys((word, at) for word, at in moved if at < len(word)))
    following = {word[at] for word, at in inside}
    return (following | starts.keys() if whole else following), whole


@lru_cache(maxsize=64)
def _by_first_token(words: tuple[tuple[int, ...], ...]) -> dict[int, list[tuple[int, ...]]]:
    found: dict[int, list[tuple[int, ...]]] = {}
    for word in words:
        found.setdefault(word[0], []).append(word)
    return found
