"""The arithmetic: from the arrival times of tokens to tokens/s and latencies. Standard library only.

Salver and the baseline report the same `Trace`s, so both columns come from the same formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.workload import BenchRequest, Kind, Point

LATENCIES = tuple(f"{name}_p{q}" for name in ("ttft", "itl") for q in (50, 95, 99))


class BenchError(Exception):
    """A measurement that could not be made, or that measured something else; says why."""


@dataclass(slots=True)
class Trace:
    """One request as its caller saw it. Times in seconds since the run's start, when the first is sent."""

    arrivals: list[tuple[float, int]]  # when tokens came, and how many at once
    token_ids: list[int]


@dataclass(slots=True)
class Run:
    """One run of one point: its figure in tokens/s, latencies in seconds, and what else was read."""

    tokens_per_second: float
    wall: float
    latencies: dict[str, float]
    token_ids: list[list[int]] = field(repr=False)
    outside_model_share: float | None = None  # of the steps' time; None where it is not known
    notes: dict[str, float] = field(default_factory=dict)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated linearly between ranks, as numpy does by default.

    Raises ValueError on no values or a q outside 0 to 100.
    """
    if not values or not 0 <= q <= 100:
        raise ValueError("a percentile needs values and 0 <= q <= 100")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def gaps(trace: Trace) -> list[float]:
    """Seconds between consecutive arrivals. Tokens that came together count as one arrival."""
    times = [time for time, _ in trace.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def summarize(point: Point, requests: Sequence[BenchRequest], traces: Sequence[Trace], wall: float) -> Run:
    """The figures of one run.

    Raises BenchError when a request did not get exactly the tokens that it asked for: a rate over other
    work than the baseline's would be no comparison.
    """
    if len(requests) != len(traces):
        raise BenchError(f"{len(requests)} requests, {len(traces)} answers")
    for index, (request, trace) in enumerate(zip(requests, traces, strict=True)):
        if len(trace.token_ids) != request.max_tokens:
            raise BenchError(
                f"request {index} wanted {request.max_tokens} tokens, got {len(trace.token_ids)}"
            )
        if sum(count for _, count in trace.arrivals) != request.max_tokens:
            raise BenchError(f"request {index}: arrivals do not add up to its tokens")
    first = [trace.arrivals[0][0] - request.at for request, trace in zip(requests, traces, strict=True)]
    between = [gap for trace in traces for gap in gaps(trace)]
    latencies = {
        f"{name}_p{q}": percentile(values, q)
        for name, values in (("ttft", first), ("itl", between))
        for q in (50, 95, 99)
        if values
    }
    merged = sum(count - 1 for trace in traces for _, count in trace.arrivals)
    return Run(
        tokens_per_second=_rate(point, requests, traces, wall),
        wall=wall,
        latencies=latencies,
        token_ids=[trace.token_ids for trace in traces],
        notes={"merged_tokens": merged} if merged else {},
    )


def _rate(point: Point, requests: Sequence[BenchRequest], traces: Sequence[Trace], wall: float) -> float:
    if point.kind is Kind.PREFILL:
        return sum(len(request.prompt) for request in requests) / wall
    if point.kind in (Kind.BATCH, Kind.TRACE):
        return sum(request.max_tokens for request in requests) / wall
    arrivals = traces[0].arrivals
    if len(arrivals) < 2:
        raise BenchError("all tokens came at once: no decode rate")
    return sum(count for _, count in arrivals[1:]) / (arrivals[-1][0] - arrivals[0][0])


@dataclass(slots=True)
class Side:
    """One system's runs of one point, and why runs failed."""

    runs: list[Run] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the runs; None when any run failed: half a point is no point."""
        if self.errors or not self.runs:
            return None
        return median(run.tokens_per_second for run in self.runs)

    def latency(self, name: str) -> float | None:
        """The median over the runs of one of LATENCIES, seconds."""
        values = [run.latencies[name] for run in self.runs if name in run.latencies]
        return median(values) if values and not self.errors else None

    @property
    def outside_model_share(self) -> float | None:
        """The median over the runs; None when no run knows it."""
        values = [run.outside_model_share for run in self.runs if run.outside_model_share is not None]
        return median(values) if values and not self.errors else None


@dataclass(slots=True)
class PointResult:
    """One point on both sides."""

    point: Point
    salver: Side = field(default_factory=Side)
    baseline: Side = field(default_factory=Side)

    @property
    def ratio(self) -> float | None:
        """Salver's median over the baseline's."""
        ours, theirs = self.salver.tokens_per_second, self.baseline.tokens_per_second
        return None if ours is None or not theirs else ours / theirs

    @property
    def same_outputs(self) -> tuple[int, int] | None:
        """Requests whose token ids both sides agree on, of how many; None without a baseline.

        In float32 nearly all agree; in bfloat16 an argmax between near-equal logits may go either way.
        """
        pairs = [
            (ours, theirs)
            for mine, other in zip(self.salver.runs, self.baseline.runs, strict=False)
            for ours, theirs in zip(mine.token_ids, other.token_ids, strict=True)
        ]
        if not pairs or self.salver.errors or self.baseline.errors:
            return None
        return sum(ours == theirs for ours, theirs in pairs), len(pairs)

    @property
    def failed(self) -> bool:
        return bool(self.salver.errors or self.baseline.errors)
