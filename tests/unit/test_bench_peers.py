"""The pure parts of `make bench-peers`: traces, server-sent events, records, the table."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks.figures import BenchError, Trace, summarize
from benchmarks.peer_table import best_rival, report
from benchmarks.peers import PEERS
from benchmarks.peers.http_server import UNKNOWN_ID, body_of, events_of
from benchmarks.peers.llamacpp import LlamaCpp
from benchmarks.records import Record, Records
from benchmarks.workload import (
    TRACE_SAMPLE,
    BenchRequest,
    Kind,
    Point,
    read_trace,
    scale_trace,
    trace_requests,
)

MACHINE = {"cpu": "a processor", "cores": 2, "load_average": 0.0, "commit": "abc", "date": "today"}
WORKLOAD = {"model": "smollm2", "threads": 2, "seed": 0}


def test_the_sample_trace_is_read_and_scaled() -> None:
    trace = read_trace(TRACE_SAMPLE)
    assert len(trace) == 100 and trace[0].at == 0
    scaled = scale_trace(trace, num_requests=41, rate=2.0, shrink=4.0, max_length=512)
    assert len(scaled) == 41 and scaled[-1].at == pytest.approx(20.0)
    assert scaled[0].prompt_length == round(trace[0].prompt_length / 4)
    assert all(one.prompt_length + one.output_length <= 512 for one in scaled)
    first, again, other = (
        trace_requests(scaled, seed=0, repeat=repeat, vocab_size=1000) for repeat in (0, 0, 1)
    )
    assert first == again != other


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="TIMESTAMP"):
        read_trace(path)


def test_ttft_counts_from_the_requests_own_arrival() -> None:
    point = Point("trace", "trace", Kind.TRACE, 1, (1, 1), (2, 2))
    run = summarize(point, [BenchRequest((300,), 2, at=5.0)], [Trace([(5.5, 1), (6.0, 1)], [1, 2])], 8.0)
    assert run.latencies["ttft_p99"] == pytest.approx(0.5)
    assert run.tokens_per_second == pytest.approx(0.25)


def events(answer: bytes) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        reader = asyncio.StreamReader()
        reader.feed_data(answer)
        reader.feed_eof()
        return [event async for event in events_of(body_of(reader))]

    return asyncio.run(read())


def test_events_are_read_across_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [b'data: {"a"', b': 1}\n\ndata: {"a": 2}\n\n', b"data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    assert events(head + body) == [{"a": 1}, {"a": 2}]


def test_a_refusal_is_told() -> None:
    with pytest.raises(BenchError, match="503"):
        events(b"HTTP/1.1 503 Busy\r\n\r\nloading")


def test_tokens_that_llama_cpp_holds_back_are_counted() -> None:
    trace = Trace([], [])
    LlamaCpp.note(None, {"tokens_predicted": 1, "tokens": [7]}, 1.0, trace)  # type: ignore[arg-type]
    LlamaCpp.note(None, {"tokens_predicted": 3, "tokens": [9]}, 2.0, trace)  # type: ignore[arg-type]
    LlamaCpp.note(None, {"tokens_predicted": 3, "tokens": []}, 2.1, trace)  # type: ignore[arg-type]
    assert trace.token_ids == [7, UNKNOWN_ID, 9] and trace.arrivals == [(1.0, 1), (2.0, 2)]


def test_records_go_on_and_a_failed_peer_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    records = Records.open(path, MACHINE, WORKLOAD)
    records.points["decode_1"] = "one stream"
    for peer, rate in (("salver-bf16", 90.0), ("llamacpp-bf16", 60.0), ("openvino-bf16", 45.0)):
        records.add(Record(peer, "decode_1", 0, rate, 1.0, {"ttft_p50": 0.1}, {}, "today"))
    records.add_roofline({"memory": 26.9e9, "bf16": 4e11, "int8": 8e11})
    records.fail("vllm-bf16", "*", "start: no\nluck")
    again = Records.open(path, MACHINE, WORKLOAD)
    assert again.has("salver-bf16", "decode_1", 0) and not again.has("salver-bf16", "decode_1", 1)
    assert best_rival(again, PEERS, "bf16", "decode_1") == 60.0
    text = report(again, PEERS)
    assert "1.50" in text and "90%" in text
    assert "- failed: vllm-bf16/*: start: no luck" in text
    assert any("vLLM" in line and "failed" in line for line in text.splitlines())
    assert again.failed(["vllm-bf16"], ["decode_1"]) and not again.failed(["salver-bf16"], ["decode_1"])


def test_records_of_another_commit_are_refused(tmp_path: Path) -> None:
    Records.open(tmp_path / "runs.json", MACHINE, WORKLOAD).save()
    with pytest.raises(BenchError, match="another commit"):
        Records.open(tmp_path / "runs.json", MACHINE | {"commit": "def"}, WORKLOAD)
