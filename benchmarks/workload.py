"""What is asked: the points of the benchmark and their seeded requests. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

FIRST_PLAIN_TOKEN = 256
"""Ids from here on are ordinary text in every vocabulary that the benchmark serves: the special tokens
and single bytes come first."""


class Kind(StrEnum):
    """Which number a point is about."""

    DECODE = "decode"  # tokens/s between the first and the last token of one stream
    PREFILL = "prefill"  # prompt tokens/s until a one-token answer is complete
    BATCH = "batch"  # output tokens/s over the wall time of requests sent at once


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the table. Lengths in tokens, both ends included."""

    name: str
    title: str
    kind: Kind
    num_requests: int
    prompt_lengths: tuple[int, int]
    output_lengths: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt of token ids, and the number of tokens to generate: no more, no fewer."""

    prompt: tuple[int, ...]
    max_tokens: int


POINTS: dict[str, Point] = {
    point.name: point
    for point in (
        Point("decode_1", "one stream, 64 in, 128 out: decode", Kind.DECODE, 1, (64, 64), (128, 128)),
        Point("prefill_512", "prefill of 512", Kind.PREFILL, 1, (512, 512), (1, 1)),
        Point("prefill_1500", "prefill of 1500", Kind.PREFILL, 1, (1500, 1500), (1, 1)),
        Point("batch_16", "16 at once, 16-256 in, 32-128 out", Kind.BATCH, 16, (16, 256), (32, 128)),
        Point("batch_32", "32 at once, 16-256 in, 32-128 out", Kind.BATCH, 32, (16, 256), (32, 128)),
    )
}


def make_requests(point: Point, *, seed: int, repeat: int, vocab_size: int) -> tuple[BenchRequest, ...]:
    """The requests of one run of a point; equal arguments give equal requests, in any process.

    The lengths depend on the seed and the point alone, so that every repeat is the same amount of work;
    the token ids depend on the repeat too, so that no repeat finds its prompts in the prefix cache.

    Raises ValueError for a vocabulary that has no ordinary ids.
    """
    if vocab_size <= FIRST_PLAIN_TOKEN:
        raise ValueError(f"a vocabulary of {vocab_size} has no ids from {FIRST_PLAIN_TOKEN} on")
    # A string seeds Random by its SHA-512: the same everywhere, unlike hash().
    lengths = random.Random(f"lengths/{seed}/{point.name}")
    shapes = [
        (lengths.randint(*point.prompt_lengths), lengths.randint(*point.output_lengths))
        for _ in range(point.num_requests)
    ]
    ids = random.Random(f"ids/{seed}/{point.name}/{repeat}")
    return tuple(
        BenchRequest(
            prompt=tuple(ids.randrange(FIRST_PLAIN_TOKEN, vocab_size) for _ in range(prompt_length)),
            max_tokens=output_length,
        )
        for prompt_length, output_length in shapes
    )
