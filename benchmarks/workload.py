"""What is asked: the points of the benchmark and their seeded requests. Standard library only."""

from __future__ import annotations

import csv
import datetime
import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

FIRST_PLAIN_TOKEN = 256
"""Ids from here on are ordinary text in every vocabulary that the benchmark serves: the special tokens
and single bytes come first."""


class Kind(StrEnum):
    """Which number a point is about."""

    DECODE = "decode"  # tokens/s between the first and the last token of one stream
    PREFILL = "prefill"  # prompt tokens/s until a one-token answer is complete
    BATCH = "batch"  # output tokens/s over the wall time of requests sent at once
    TRACE = "trace"  # output tokens/s over the wall time of requests that arrive one by one


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
    at: float = 0.0
    """When it is sent, seconds since the run's start."""


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

TRACE_SAMPLE = Path(__file__).with_name("trace_sample.csv")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a recorded trace: seconds since the first one, and its lengths in tokens."""

    at: float
    prompt_length: int
    output_length: int


def read_trace(path: Path) -> list[Arrival]:
    """A trace in the format of the Azure LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens.

    Lines that start with `#` are comments. Raises OSError, and ValueError for a file of another format.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    try:
        # The recorded fraction has seven digits; Python reads six.
        times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
        arrivals = [
            Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for time, row in zip(times, rows, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a trace of TIMESTAMP,ContextTokens,GeneratedTokens: {error}"
        ) from error
    if len(arrivals) < 2 or arrivals[-1].at <= 0:
        raise ValueError(f"{path}: a trace needs two requests or more, in the order of their arrival")
    return arrivals


def scale_trace(
    trace: Iterable[Arrival], *, num_requests: int, rate: float, shrink: float, max_length: int
) -> list[Arrival]:
    """The first requests, arriving `rate` a second on average, their lengths divided by `shrink`.

    The shape stays: gaps keep their proportions. A prompt and its answer fit in `max_length` tokens.
    """
    taken = list(trace)[:num_requests]
    span = taken[-1].at - taken[0].at
    stretch = (len(taken) - 1) / rate / span if span > 0 else 0.0
    scaled = []
    for arrival in taken:
        output = max(1, min(round(arrival.output_length / shrink), max_length // 2))
        prompt = max(1, min(round(arrival.prompt_length / shrink), max_length - output))
        scaled.append(Arrival((arrival.at - taken[0].at) * stretch, prompt, output))
    return scaled


def trace_requests(
    trace: Iterable[Arrival], *, seed: int, repeat: int, vocab_size: int
) -> tuple[BenchRequest, ...]:
    """The requests of one run of a (scaled) trace, with prompts as `make_requests` draws them."""
    ids = random.Random(f"ids/{seed}/trace/{repeat}")
    return tuple(
        BenchRequest(
            tuple(ids.randrange(FIRST_PLAIN_TOKEN, vocab_size) for _ in range(arrival.prompt_length)),
            arrival.output_length,
            arrival.at,
        )
        for arrival in trace
    )


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
