"""Too much work on a real server: who cannot be answered in time is told so at once, with push-back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from support import calls
from support.prometheus import alertmanager, prometheus, scraping, webhook
from support.serving import Server, wait_until

from salver.v1 import common_pb2

LONG = {"max_tokens": 400, "ignore_eos": True}
RULES = Path(__file__).parents[2] / "deploy/kubernetes/components/monitoring/prometheusrule.yaml"
LATE = {**LONG, "priority": -9}  # behind all others


@pytest.fixture(scope="module")
def small(start_module_server: Callable[..., Server], tiny_llama: Path) -> Server:
    return start_module_server(tiny_llama, "--max-num-seqs", "1", "--speculation", "off")


@contextmanager
def crowd_of(small: Server, number: int) -> Iterator[list[Any]]:
    """So many streams of 400 tokens, one at a time."""
    small.generate("how fast is it?", max_tokens=100, ignore_eos=True)
    streams = [
        small.generation.StreamGenerate(calls.stream_request(f"number {i}", **LONG)) for i in range(number)
    ]
    wait_until("a queue", lambda: small.occupancy()[1] >= number * 3 // 4, 60)  # the first may be done by now
    yield streams
    for stream in streams:
        stream.cancel()
    small.wait_idle(60)


@pytest.fixture
def crowd(small: Server) -> Iterator[list[Any]]:
    """No machine does half of that within a second."""
    with crowd_of(small, 40) as streams:
        yield streams


def test_what_would_be_late_is_refused_at_once(small: Server, crowd: list[Any]) -> None:
    request = calls.generate_request("in a hurry", **LATE)
    failure = calls.failure_of(lambda: small.generation.Generate(request, timeout=1.0))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED, failure
    assert failure.reason == "DEADLINE_TOO_SHORT"
    assert failure.retry_after is not None and failure.retry_after >= 0.5
    assert failure.pushback_ms == str(round(failure.retry_after * 1000))
    stream = calls.stream_request("in a hurry", **LATE)
    failure = calls.failure_of(lambda: list(small.generation.StreamGenerate(stream, timeout=1.0)))
    assert failure.reason == "DEADLINE_TOO_SHORT"
    assert small.metric("salver_rejections_total", reason="deadline") == 2
    no_hurry = calls.stream_request("no hurry", max_tokens=1, priority=-9)
    patient = small.generation.StreamGenerate(no_hurry, timeout=3600)
    for running in crowd:
        running.cancel()
    assert list(patient)[-1].completions[0].finish_reason == common_pb2.FINISH_REASON_LENGTH


def test_an_idle_server_takes_any_deadline(small: Server) -> None:
    before = small.metric("salver_rejections_total", reason="deadline")
    stream = small.generation.StreamGenerate(
        calls.stream_request("as far as it comes", max_tokens=400, ignore_eos=True), timeout=0.2
    )
    try:
        list(stream)
    except grpc.RpcError as error:
        assert calls.read_failure(error).code is grpc.StatusCode.DEADLINE_EXCEEDED
    small.wait_idle()
    assert small.metric("salver_rejections_total", reason="deadline") == before


def test_an_overload_reaches_whoever_is_on_call(
    small: Server, find_tool: Callable[[str], str], tmp_path: Path
) -> None:
    """Refusals, a real Prometheus with the rules of deploy/, a real Alertmanager, and a webhook behind it.

    The rules are those that are deployed, but that they need not hold for minutes before they fire.
    """
    prometheus_tool, alertmanager_tool = find_tool("prometheus"), find_tool("prometheus-alertmanager")
    spec = yaml.safe_load(RULES.read_text())["spec"]
    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        rule["for"] = "0s"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    config = scraping(small, "1s", namespace="salver", pod="a")
    config["rule_files"] = [f"{tmp_path}/rules.yaml"]
    rejecting = 'ALERTS{alertname="SalverRejecting"}'
    request = calls.generate_request("in a hurry", **LATE)
    with webhook() as (url, received), alertmanager(alertmanager_tool, tmp_path / "a", url) as address:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [address]}]}]}
        with prometheus(prometheus_tool, tmp_path / "p", config) as running:
            running.wait_scraped()
            wait_until("our counter", lambda: running.query("salver_rejections_total"))
            assert not running.query(rejecting)

            def told() -> Any:
                with suppress(grpc.RpcError):  # refused, or on a busy machine out of time before that
                    small.generation.Generate(request, timeout=1.0)
                alerts = [alert for message in list(received) for alert in message["alerts"]]
                return [alert for alert in alerts if alert["labels"]["alertname"] == "SalverRejecting"]

            with crowd_of(small, 300):  # 120,000 tokens: half a minute on the fastest machine
                alert = wait_until("the alert at the webhook", told, 60, pause=0.1)[0]
            assert alert["labels"]["severity"] == "warning" and alert["labels"]["namespace"] == "salver"
            assert alert["annotations"]["runbook_url"] == "docs/operations.md#salverrejecting"
            assert running.query(rejecting)
