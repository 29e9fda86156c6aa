"""Measures Salver as its callers see it: through gRPC, with the asynchronous client, over streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import BenchError, Run, Trace, summarize
from benchmarks.processes import MODEL_SECONDS, STEP_SECONDS, Server, outside_model_share
from benchmarks.workload import BenchRequest, Point
from salver.client import AsyncClient, SalverError

TIMEOUT = 900.0
"""Deadline of one request in seconds: the slowest point on a slow machine, in float32, ends well before."""


@dataclass(frozen=True, slots=True)
class About:
    """What the server says of itself."""

    version: str
    device: str
    dtype: str
    torch_version: str
    numerics_id: str
    vocab_size: int
    max_model_len: int
    phases: tuple[tuple[str, float], ...]


async def _ask_about(address: str) -> About:
    async with AsyncClient(address) as client:
        info = await client.server_info()
        model = await client.get_model()
    return About(
        version=info.version,
        device=info.device,
        dtype=model.dtype,
        torch_version=info.torch_version,
        numerics_id=info.numerics_id,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        phases=tuple(info.startup_phases.items()),
    )


def about(server: Server) -> About:
    """What the server says of itself. Raises BenchError."""
    try:
        return asyncio.run(_ask_about(server.address))
    except SalverError as error:
        raise BenchError(f"{type(error).__name__}: {error}") from error


async def _stream(client: AsyncClient, request: BenchRequest, started: float) -> Trace:
    trace = Trace([], [])
    if request.at:
        await asyncio.sleep(started + request.at - time.perf_counter())
    stream = client.stream_generate(
        request.prompt,
        temperature=0.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        timeout=TIMEOUT,
    )
    async for message in stream:
        for delta in message.completions:  # one sample was asked for, so at most one
            if delta.token_ids:
                trace.arrivals.append((time.perf_counter() - started, len(delta.token_ids)))
                trace.token_ids.extend(delta.token_ids)
    return trace


async def stream_all(address: str, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
    """Sends each request at its time; the traces, and the wall time in seconds. Raises SalverError."""
    async with AsyncClient(address) as client:
        await client.server_info()  # connects, which is not what is measured
        started = time.perf_counter()
        traces = await asyncio.gather(*(_stream(client, request, started) for request in requests))
        return list(traces), time.perf_counter() - started


def run_point(server: Server, point: Point, requests: Sequence[BenchRequest]) -> Run:
    """Sends each request at its time and waits for all answers.

    Raises BenchError with the server's or the client's words when any of them fails.
    """
    before = server.metrics()
    try:
        traces, wall = asyncio.run(stream_all(server.address, requests))
    except SalverError as error:
        raise BenchError(f"{type(error).__name__}: {error}") from error
    after = server.metrics()
    run = summarize(point, requests, traces, wall)
    run.outside_model_share = outside_model_share(before, after)
    for name, share in ((STEP_SECONDS, "steps_share_of_wall"), (MODEL_SECONDS, "model_share_of_wall")):
        if name in after:
            run.notes[share] = (after[name] - before.get(name, 0.0)) / wall
    for name in ("salver_preemptions_total", "salver_prefix_cache_hits_total"):
        if changed := after.get(name, 0.0) - before.get(name, 0.0):
            run.notes[name] = changed
    return run
