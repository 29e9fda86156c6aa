"""Calls that outlive their servers, against the fake: every cut, both clients, and what is refused."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from salver.client import (
    AsyncClient,
    Client,
    ConnectionOptions,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GenerateResult,
    ResourceExhausted,
    Unavailable,
)
from salver.client.addresses import AddressError, to_target
from salver.client.testing import FakeServer, made_up, token_id

WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "n": 3, "logprobs": 0, "prompt_logprobs": 0},
    {"stop": ["calm and", "old the"], "temperature": 1.0, "n": 2},
    {"stop": "sea was", "include_stop": True, "temperature": 1.0, "seed": 3, "max_tokens": 60},
]
ONCE = ConnectionOptions(max_attempts=1)


def read(address: Any, options: ConnectionOptions, way: dict[str, Any]) -> tuple[list[GenerateResult], Any]:
    with Client(address, options) as client, client.stream_generate("two words", **way) as stream:
        return list(stream), stream


def read_async(
    address: Any, options: ConnectionOptions, way: dict[str, Any]
) -> tuple[list[GenerateResult], Any]:
    async def run() -> tuple[list[GenerateResult], Any]:
        async with (
            AsyncClient(address, options) as client,
            client.stream_generate("two words", **way) as stream,
        ):
            return [delta async for delta in stream], stream

    return asyncio.run(run())


@pytest.mark.parametrize("reader", [read, read_async])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_stream_cut_anywhere_is_the_same_stream(reader: Callable[..., Any], way: dict[str, Any]) -> None:
    with FakeServer() as fake:
        way = {"seed": 7, **way}
        whole, _ = reader(fake.address, ONCE, way)
        for cut in range(len(whole)):
            fake.fail(after=cut)
            deltas, stream = reader(fake.address, ONCE, way)
            assert stream.resumptions == 1
            # Message for message: nothing twice, nothing missing, usage as of an undisturbed call.
            assert deltas == whole
        assert stream.result.usage is not None and stream.result.usage.resumed_tokens == 0


def test_a_seed_is_drawn_before_the_call() -> None:
    with FakeServer() as fake, Client(fake.address, ONCE) as client:
        fake.fail()
        first = client.generate("p", temperature=1.0)
        assert len({request.sampling.seed for request in fake.requests}) == 1
        assert client.generate("p", temperature=1.0, seed=first.seed).text == first.text
        assert client.generate("p", temperature=1.0).text != first.text
        fake.requests.clear()
        fake.fail()
        assert client.chat("p").text
        assert len({request.sampling.seed for request in fake.requests}) == 1


def test_a_server_that_is_killed_and_one_that_drains() -> None:
    beyond = threading.Event()

    def script(request: Any) -> Any:
        for index, piece in enumerate(made_up(request)):
            if index == 3:
                beyond.wait(20)
            yield piece

    way = {"temperature": 1.0, "seed": 5}
    with FakeServer(script) as one, FakeServer(script) as other, FakeServer() as free:
        with Client([one.address, other.address]) as client:
            stream = client.stream_generate("two words", **way)
            next(stream)
            first, second = (one, other) if one.requests else (other, one)
            second.drain()
            refusing = replace(ONCE, resume_attempts=0)
            with Client(second.address, refusing) as direct, pytest.raises(Unavailable):
                direct.generate("x")
            beyond.set()
            assert [delta.text for delta in stream]  # what runs goes on, wherever it runs
            assert all(client.generate("y").text for _ in range(4))
            assert not any(request.prompt.text == "two words" for request in second.requests)
        beyond.clear()
        with Client([first.address, free.address], ConnectionOptions(health_checking=False)) as client:
            seen = len(first.requests)
            while len(first.requests) == seen or not free.requests:  # until both are connected
                client.generate("y", max_tokens=1)
            streams = [client.stream_generate("two words", **way) for _ in range(4)]
            for each in streams:
                next(each)
            first.stop()
            beyond.set()
            for each in streams:
                list(each)
            assert any(each.resumptions for each in streams)
            assert {each.result.text for each in streams} == {stream.result.text}


def test_other_numerics() -> None:
    with FakeServer() as same, FakeServer(numerics_id="other") as other:
        whole = read(same.address, ONCE, {"seed": 2})[0]
        for server in (same, other):
            server.fail(after=3)
        with Client([same.address, other.address], ONCE) as client:
            stream = client.stream_generate("two words", seed=2)
            next(stream)
            (lost,) = (server for server in (same, other) if not server._faults)
            lost._numerics_id = "gone"
            for server in (same, other):
                server._faults.clear()
            with pytest.raises(FailedPrecondition, match="allow_numerics_mismatch") as caught:
                list(stream)
        assert caught.value.reason == "NUMERICS_MISMATCH"
        lost.fail(after=3)
        allowed = replace(ONCE, allow_numerics_mismatch=True)
        with Client(lost.address, allowed) as client:
            stream = client.stream_generate("two words", seed=2)
            next(stream)
            lost._numerics_id = "changed"
            list(stream)
        assert stream.result.text == "".join(delta.text for delta in whole)


def test_a_server_that_goes_on_elsewhere_is_data_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as fake:
        fake.fail(after=3)
        monkeypatch.setattr("salver.client.testing._Sample.replay", lambda self, known: None)
        with pytest.raises(DataLoss):
            read(fake.address, ONCE, {})


def test_attempts_are_bounded_and_the_deadline_counts_on() -> None:
    with FakeServer(delay=0.1) as fake:
        fake.fail(after=2, times=9)
        with pytest.raises(Unavailable):
            read(fake.address, replace(ONCE, resume_attempts=2), {"timeout": 8.0})
        assert len(fake.requests) == 3
        fake._faults.clear()
        fake.requests.clear()
        fake.fail(after=2, times=90)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            read(fake.address, replace(ONCE, resume_attempts=90), {"timeout": 1.0})
        assert 1 < len(fake.requests) < 10  # 0.2 s each: one deadline for all of them
        fake._faults.clear()
        fake.fail(retry_after=30.0)
        start = time.monotonic()
        with pytest.raises(Unavailable):  # at once: there is no time for such a pause
            read(fake.address, ONCE, {"timeout": 5.0})
        assert time.monotonic() - start < 4


def test_a_full_queue_is_an_answer_but_not_to_a_stream_that_was_cut() -> None:
    full = {"code": grpc.StatusCode.RESOURCE_EXHAUSTED, "retry_after": 0.01}
    with FakeServer() as fake:
        fake.fail(**full)
        with pytest.raises(ResourceExhausted):
            read(fake.address, ONCE, {})
        fake.fail(after=2)
        fake.fail(**full)
        assert read(fake.address, ONCE, {})[1].resumptions == 1


def test_no_more_calls_at_once_than_allowed() -> None:
    options = ConnectionOptions(max_concurrent_calls=1)
    with FakeServer() as fake:
        with Client(fake.address, options) as client:
            with client.stream_generate("p") as stream:
                next(stream)
                with pytest.raises(DeadlineExceeded, match="max_concurrent_calls"):
                    client.generate("p", timeout=0.05)
                assert client.health() == "SERVING"
            assert client.generate("p").text  # the stream was left, and gave its place back

        async def run() -> None:
            async with AsyncClient(fake.address, options) as client:
                async with client.stream_generate("p") as stream:
                    await anext(stream)
                    with pytest.raises(DeadlineExceeded, match="max_concurrent_calls"):
                        await client.generate("p", timeout=0.05)
                assert (await client.generate("p")).text

        asyncio.run(run())
        assert len(fake.requests) == 4


def test_addresses() -> None:
    assert to_target("h:1").uri == "h:1" and not to_target(["h:1"]).several
    assert to_target("dns:///h:1").several
    assert to_target("127.0.0.1:1, 127.0.0.2:2").uri == "ipv4:127.0.0.1:1,127.0.0.2:2"
    assert to_target(["127.0.0.1:1", "[::1]:2"]).uri == "ipv6:[::ffff:127.0.0.1]:1,[::1]:2"
    for bad in ("", ["a:1", "b"], ["a:1", "dns:///b:1"], ["127.0.0.1:1", "nowhere.invalid:1"]):
        with pytest.raises(AddressError):
            to_target(bad)


def test_the_examples_of_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "FakeServer" in code]
    exec(example, {})


def test_the_fake_says_what_its_script_says() -> None:
    with FakeServer(["Il", " était", " une"]) as fake, Client(fake.address) as client:
        result = client.generate("p", max_tokens=2)
        assert result.text == "Il était"
        assert result.completions[0].token_ids == (token_id("Il"), token_id(" était"))
        assert client.chat("p", stop="une").completions[0].text == "Il était "
        assert client.get_model().name == "fake"
