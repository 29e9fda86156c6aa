"""Calls that have ended leave nothing in the front, however they ended: objects of Python are counted.

What gRPC's own code leaves is not seen here (docs/reliability.md, "Soak").
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import grpc
import pytest
from support.fake_service import Service, request, run, service, stream_request, until

CALLS = 60


async def ask(served: Service, kind: str) -> None:
    generation = served.generation
    with contextlib.suppress(grpc.aio.AioRpcError):
        if kind == "answered":
            await generation.Generate(request())
        elif kind == "refused":
            await generation.Generate(request(max_tokens=10**6))
        elif kind == "past its deadline":
            await generation.Generate(request(max_tokens=150), timeout=0.002)
        else:
            stream = generation.StreamGenerate(stream_request(max_tokens=150))
            await stream.read()
            stream.cancel()


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """What other tests have left is not counted, and not walked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", ["answered", "refused", "cancelled", "past its deadline"])
def test_ended_calls_leave_nothing(kind: str) -> None:
    """Less than half an object a call; a leak of ours has many."""

    async def test() -> None:
        async with service(deadline_admission=False) as served:

            async def objects_after_calls() -> int:
                for _ in range(CALLS):
                    await ask(served, kind)
                await until(lambda: not (served.engine.running or served.rpc._calls.num_running))
                return objects()

            def objects() -> int:
                served.engine.requests.clear()
                served.engine.aborted.clear()
                gc.collect()
                return len(gc.get_objects())

            await objects_after_calls()  # what is made once
            before = await objects_after_calls()
            await objects_after_calls()
            await until(lambda: objects() < before + CALLS / 2)  # the last ones' callbacks are still to run

    run(test)
