"""A real Prometheus scrapes the server, and promtool finds nothing to say about the exposition."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.prometheus import prometheus, scraping
from support.serving import Server, total, wait_until

EXPECTED = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "build_info"),
    *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
    *("e2e_request_latency_seconds_count", "request_queue_time_seconds_count"),
    *("request_prefill_time_seconds_count", "request_decode_time_seconds_count"),
    *("request_prompt_tokens_count", "request_generation_tokens_count", "batch_sequences_count"),
    *("request_max_generation_tokens_count",),
    *("prompt_tokens_total", "generation_tokens_total", "batch_tokens_count", "step_duration_seconds_count"),
    *("preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
    *("draft_tokens_total", "accepted_draft_tokens_total"),
    *("rejections_total", "request_success_total"),
)


@pytest.mark.tool("promtool")
def test_promtool_is_content(tiny: Server, tool: str) -> None:
    tiny.tokens("warm", max_tokens=2)
    done = subprocess.run(
        [tool, "check", "metrics"], input=tiny.exposition(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_series_is_there_before_the_first_request(
    start_server: Callable[..., Server], tiny_llama: Path
) -> None:
    """Rates and alerts want a zero, not an absence."""
    fresh = start_server(tiny_llama).metrics()
    names = {name for name, _ in fresh}
    assert {f"salver_{name}" for name in EXPECTED} <= names
    for reason in ("stop", "length", "abort"):
        assert total(fresh, "salver_request_success_total", finish_reason=reason) == 0


@pytest.mark.tool("prometheus")
def test_prometheus_scrapes_the_server(tiny: Server, tool: str, tmp_path: Path) -> None:
    for i in range(3):
        tiny.tokens(f"prompt {i}", max_tokens=4, ignore_eos=True)
    tiny.wait_idle()
    truth = tiny.metric("salver_generation_tokens_total")
    with prometheus(tool, tmp_path, scraping(tiny)) as running:
        running.wait_scraped()
        (series,) = wait_until("our counter", lambda: running.query("salver_generation_tokens_total"))
        assert float(series["value"][1]) == truth
        for name in EXPECTED:
            assert running.query(f"salver_{name}"), f"Prometheus has no salver_{name}"
        quantile = running.query(
            "histogram_quantile(0.5, sum by (le) (salver_time_to_first_token_seconds_bucket))"
        )
        assert 0 < float(quantile[0]["value"][1]) < 60
