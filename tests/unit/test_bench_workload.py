"""The benchmark's own arithmetic: requests, percentiles, rates, tables. No server, no torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import table
from benchmarks.figures import BenchError, PointResult, Run, Side, Trace, gaps, percentile, summarize
from benchmarks.processes import METRICS, SERVING, memory_of, outside_model_share, parse_metrics
from benchmarks.workload import FIRST_PLAIN_TOKEN, POINTS, BenchRequest, make_requests

ROOT = Path(__file__).resolve().parents[2]


def digest(point: str, **options: int) -> str:
    requests = make_requests(POINTS[point], **{"seed": 0, "repeat": 0, "vocab_size": 49152} | options)
    return hashlib.sha256(repr([(r.prompt, r.max_tokens) for r in requests]).encode()).hexdigest()[:12]


def test_equal_arguments_give_equal_requests_in_another_process() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.workload import POINTS, make_requests\n"
        "print(hash(make_requests(POINTS['batch_32'], seed=7, repeat=2, vocab_size=49152)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == hash(make_requests(POINTS["batch_32"], seed=7, repeat=2, vocab_size=49152))


def test_seed_repeat_and_point_change_the_prompts() -> None:
    assert len({digest("batch_16"), digest("batch_16", seed=1), digest("batch_16", repeat=1)}) == 3
    assert digest("batch_16") == digest("batch_16")


@pytest.mark.parametrize("name", POINTS)
def test_requests_keep_their_bounds_and_every_repeat_is_the_same_amount_of_work(name: str) -> None:
    point = POINTS[name]
    shapes = set()
    for repeat in range(-1, 3):
        requests = make_requests(point, seed=3, repeat=repeat, vocab_size=1000)
        assert len(requests) == point.num_requests
        for request in requests:
            assert point.prompt_lengths[0] <= len(request.prompt) <= point.prompt_lengths[1]
            assert point.output_lengths[0] <= request.max_tokens <= point.output_lengths[1]
            assert all(FIRST_PLAIN_TOKEN <= token < 1000 for token in request.prompt)
        shapes.add(tuple((len(request.prompt), request.max_tokens) for request in requests))
    assert len(shapes) == 1


def test_no_prompt_shares_a_first_block_with_another() -> None:
    prompts = [
        request.prompt[:16]
        for name in POINTS
        for repeat in range(-1, 3)
        for request in make_requests(POINTS[name], seed=0, repeat=repeat, vocab_size=49152)
    ]
    assert len(set(prompts)) == len(prompts)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 256"):
        make_requests(POINTS["decode_1"], seed=0, repeat=0, vocab_size=256)


def test_percentile_interpolates_between_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1.0
    assert percentile(values, 50) == 2.5
    assert percentile(values, 95) == pytest.approx(3.85)
    assert percentile(values, 100) == 4.0
    assert percentile([7.0], 95) == 7.0
    for bad, q in (([], 50), ([1.0], 101), ([1.0], -1)):
        with pytest.raises(ValueError):
            percentile(bad, q)


def arrivals(*times: float) -> list[tuple[float, int]]:
    return [(time, 1) for time in times]


def test_a_decode_rate_leaves_out_the_first_token() -> None:
    trace = Trace([(1.0, 1), (1.1, 1), (1.3, 2)], [5, 6, 7, 8])
    run = summarize(POINTS["decode_1"], [BenchRequest((1,), 4)], [trace], wall=9.0)
    assert run.tokens_per_second == pytest.approx(3 / 0.3)
    assert run.latencies["ttft_p50"] == 1.0
    assert run.latencies["itl_p50"] == pytest.approx(0.15)
    assert run.notes == {"merged_tokens": 1}


def test_a_prefill_rate_counts_prompt_tokens_and_has_no_gaps() -> None:
    run = summarize(POINTS["prefill_512"], [BenchRequest((1,) * 512, 1)], [Trace([(0.5, 1)], [9])], wall=2.0)
    assert run.tokens_per_second == 256
    assert set(run.latencies) == {"ttft_p50", "ttft_p95", "ttft_p99"}


def test_a_batch_rate_counts_output_tokens_over_the_wall() -> None:
    requests = [BenchRequest((1,), 2), BenchRequest((1,), 3)]
    traces = [Trace(arrivals(0.1, 0.2), [1, 2]), Trace(arrivals(0.3, 0.4, 0.6), [1, 2, 3])]
    run = summarize(POINTS["batch_16"], requests, traces, wall=2.0)
    assert run.tokens_per_second == 2.5
    assert run.latencies["ttft_p50"] == pytest.approx(0.2)
    assert run.latencies["itl_p50"] == pytest.approx(0.1)
    assert gaps(traces[1]) == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (Trace(arrivals(0.1), [1]), "wanted 2 tokens, got 1"),
        (Trace(arrivals(0.1, 0.2, 0.3), [1, 2]), "do not add up"),
        (Trace([(0.1, 2)], [1, 2]), "came at once"),
    ],
)
def test_an_answer_of_another_size_is_no_measurement(trace: Trace, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        summarize(POINTS["decode_1"], [BenchRequest((1,), 2)], [trace], wall=1.0)


def side(*rates: float, errors: tuple[str, ...] = ()) -> Side:
    latencies = {"ttft_p50": 0.1, "ttft_p95": 0.2, "itl_p50": 0.01, "itl_p95": 0.25}
    return Side([Run(rate, 1.0, latencies, [[1, 2]]) for rate in rates], list(errors))


def test_medians_and_ratio() -> None:
    result = PointResult(POINTS["decode_1"], side(10.0, 90.0, 30.0), side(20.0, 10.0, 1.0))
    assert result.salver.tokens_per_second == 30.0
    assert result.baseline.tokens_per_second == 10.0
    assert result.ratio == 3.0
    assert result.same_outputs == (3, 3)
    assert not result.failed


def test_one_failed_run_fails_its_point() -> None:
    result = PointResult(POINTS["decode_1"], side(10.0, errors=("repeat 2: gone",)), side(20.0))
    assert result.salver.tokens_per_second is None
    assert result.salver.latency("ttft_p50") is None
    assert result.ratio is None
    assert result.same_outputs is None
    assert result.failed


def rows_of(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_every_point_and_a_reason_for_every_failure() -> None:
    good = PointResult(POINTS["decode_1"], side(123.4), side(61.7))
    good.salver.runs[0].outside_model_share = 0.124
    bad = PointResult(POINTS["prefill_512"], side(errors=("repeat 1: a | b\nc",)), side(50.0))
    alone = PointResult(POINTS["batch_16"], side(9.876), Side())
    text = table.points_table([good, bad, alone])
    head, rule, *rows = rows_of(text)
    assert {len(row) for row in (head, rule, *rows)} == {10}
    assert rows[0] == [
        POINTS["decode_1"].title, "123", "61.7", "2.00", "100 / 200", "10.0 / 250", "100 / 200", "10.0 / 250",
        "12%", "1/1",
    ]  # fmt: skip
    assert rows[1][1:4] == ["failed", "50.0", "-"]
    assert rows[2][1:4] == ["9.88", "-", "-"]
    assert "- failed: prefill of 512, Salver: repeat 1: a / b c" in text.splitlines()


def test_numbers_and_units() -> None:
    assert [table.number(value) for value in (None, 0, 0.123, 12.34, 1234.5)] == [
        "-", "0", "0.12", "12.3", "1234",
    ]  # fmt: skip
    assert table.milliseconds(None, None) == "-"
    assert table.megabytes(1_200_000_000) == "1200 MB"
    assert table.share(None) == "-"


def test_phases_end_with_the_wall_time() -> None:
    rows = list(rows_of(table.phases_table([("import torch", 1.0)], 2.5)))
    assert rows[0] == ["start-up phase", "s"]
    assert rows[2:] == [["import torch", "1.000"], ["command to SERVING, wall", "2.500"]]


def test_metrics_are_summed_over_their_labels() -> None:
    text = (
        "# HELP salver_step_duration_seconds x\n"
        'salver_step_duration_seconds_sum{model="a b"} 2.5\n'
        'salver_step_duration_seconds_sum{model="c"} 1.5\n'
        "salver_step_model_duration_seconds_sum 3.0\n"
        'salver_x_bucket{le="+Inf"} +Inf\n'
    )
    after = parse_metrics(text)
    assert after["salver_step_duration_seconds_sum"] == 4.0
    before = {"salver_step_duration_seconds_sum": 2.0, "salver_step_model_duration_seconds_sum": 1.5}
    assert outside_model_share(before, after) == pytest.approx(0.25)
    assert outside_model_share(after, after) is None
    assert outside_model_share({}, {"salver_step_duration_seconds_sum": 1.0}) is None


def test_the_servers_lines_are_recognized() -> None:
    serving = SERVING.match("serving smollm2 on 127.0.0.1:50051\n")
    assert serving and (serving["name"], serving["address"]) == ("smollm2", "127.0.0.1:50051")
    assert not SERVING.match("not serving x on y\n")
    metrics = METRICS.search("metrics on http://127.0.0.1:9090/metrics")
    assert metrics and metrics["address"] == "127.0.0.1:9090"


def test_memory_counts_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert memory_of(os.getpid()).processes >= 2
        alone = memory_of(child.pid)
        assert alone.processes == 1
        assert alone.rss > 1_000_000
    finally:
        child.kill()
        child.wait()
    with pytest.raises(BenchError):
        memory_of(child.pid)
