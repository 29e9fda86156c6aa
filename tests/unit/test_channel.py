"""Frames between front and worker: order, partial arrival, ends of stream."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salver.server.engine.async_channel import AsyncChannel
from salver.server.engine.channel import Channel, ChannelClosed, FrameDecoder, encode_frame
from salver.server.engine.request import FinishReason, SequenceOutput, StepMessage


@given(
    messages=st.lists(st.one_of(st.binary(max_size=300), st.lists(st.integers(), max_size=5))),
    sizes=st.lists(st.integers(1, 40), min_size=1),
)
def test_a_stream_cut_anywhere_gives_the_same_messages(messages, sizes):
    stream = b"".join(map(encode_frame, messages))
    decoder, received, position, cut = FrameDecoder(), [], 0, 0
    while position < len(stream):
        size = sizes[cut % len(sizes)]
        received += decoder.feed(stream[position : position + size])
        position, cut = position + size, cut + 1
    assert received == messages


def test_poll_returns_everything_waiting_in_order():
    front, worker = (Channel(end) for end in socket.socketpair())
    for number in range(100):
        front.send(number)
    assert worker.poll(1.0) == list(range(100))
    assert worker.poll(0.0) == []


def test_poll_waits_its_time_and_wakes_for_a_message():
    front, worker = (Channel(end) for end in socket.socketpair())
    begin = time.monotonic()
    assert worker.poll(0.05) == []
    assert time.monotonic() - begin >= 0.05
    thread = threading.Thread(target=front.send, args=("late",))
    thread.start()
    assert worker.poll(10.0) == ["late"]
    thread.join()


def test_the_end_of_the_stream_comes_after_what_was_sent():
    front, worker = (Channel(end) for end in socket.socketpair())
    front.send("last")
    front.close()
    assert worker.poll(1.0) == ["last"]
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            worker.poll(1.0)
    with pytest.raises(ChannelClosed):
        worker.send("to nobody")


def test_the_front_sends_without_blocking_and_keeps_order():
    """More than the socket buffers hold is queued while the worker reads nothing."""
    large = [b"x" * 100_000 + bytes([number]) for number in range(100)]

    async def main() -> None:
        ours, theirs = socket.socketpair()
        worker = Channel(theirs)
        received: list[object] = []
        closed = asyncio.Event()
        channel = await AsyncChannel.open(ours, received.append, closed.set)
        begin = time.monotonic()
        for message in large:
            channel.send(message)
        assert time.monotonic() - begin < 1.0
        read: list[object] = []
        while len(read) < len(large):
            read += await asyncio.to_thread(worker.poll, 1.0)
        assert read == large
        message = StepMessage([SequenceOutput(1, 0, [5], finish_reason=FinishReason.STOP)], [(1, 0.5)], None)
        await asyncio.to_thread(worker.send, message)
        await asyncio.to_thread(worker.send, large)
        worker.close()
        await asyncio.wait_for(closed.wait(), 5)
        assert received == [message, large]
        with pytest.raises(ChannelClosed):
            channel.send("to nobody")

    asyncio.run(main())


def test_what_is_sent_in_one_turn_of_the_loop_arrives_together():
    """A worker that wakes for the first of a call's inputs finds all of them."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        worker = Channel(theirs)
        channel = await AsyncChannel.open(ours, lambda message: None, lambda: None)
        reading = asyncio.create_task(asyncio.to_thread(worker.poll, 10.0))
        await asyncio.sleep(0)  # it may wait by now, or not: what it finds is the same
        for number in range(16):
            channel.send(number)
        assert await reading == list(range(16))
        channel.send("last")
        channel.close()
        assert await asyncio.to_thread(worker.poll, 10.0) == ["last"]

    asyncio.run(main())


def test_a_reset_connection_is_the_end_of_the_stream():
    """A Unix socket closed with unread data gives ECONNRESET on the other side."""
    ours, theirs = socket.socketpair()
    worker = Channel(theirs)
    worker.send("never read")
    ours.close()
    with pytest.raises(ChannelClosed):
        worker.poll(1.0)


def test_frames_are_pickle_protocol_5():
    assert pickle.loads(encode_frame({"a": 1})[8:]) == {"a": 1}
    assert encode_frame(1)[8:10] == b"\x80\x05"
