"""The overload benchmark's arithmetic: what is asked, what counts, what is drawn."""

from __future__ import annotations

import argparse
from xml.etree import ElementTree

import pytest
from benchmarks.curve import chart, nice_step
from benchmarks.overload import Answer, Ask, Watch, asks, measured
from benchmarks.workload import Arrival

TRACE = [Arrival(0.0, 160, 32), Arrival(1.0, 1600, 320)]
ARGS = argparse.Namespace(seed=3, shrink=16.0, slack=2.0, slack_per_token=0.1)


def test_equal_arguments_ask_the_same_and_the_rate_holds() -> None:
    first = list(asks(TRACE, ARGS, 50.0, 20.0, 1000))
    assert first == list(asks(TRACE, ARGS, 50.0, 20.0, 1000))
    assert len(first) == pytest.approx(1000, rel=0.1)
    assert {(len(ask.prompt), ask.max_tokens) for ask in first} == {(10, 2), (100, 20)}
    assert all(ask.deadline == 2.0 + 0.1 * ask.max_tokens for ask in first)
    assert first[0].prompt != first[1].prompt  # nothing is in the prefix cache
    assert min(min(ask.prompt) for ask in first) >= 256 and first[-1].at < 20.0


def test_only_what_ends_in_the_measured_time_counts() -> None:
    def answer(kind: str, at: float, ended: float | None, first: float | None = None) -> Answer:
        return Answer(Ask(at, (1,), 30, 5.0), kind, first, ended)

    answers = [
        answer("good", 0.0, 3.9, 1.0),  # in the warm-up
        answer("good", 1.0, 4.0, 2.0),
        answer("good", 5.0, 13.9, 8.0),
        answer("missed", 6.0, 11.0, 9.5),
        answer("refused", 7.0, 7.002),
        answer("", 13.0, None, 13.5),  # under way at the end
    ]
    result = measured(2.0, answers, 4.0, 14.0, Watch())
    assert (result.goodput, result.good_tokens_per_second) == (0.2, 6.0)
    assert (result.refused, result.missed) == (1, 1)
    assert (result.ttft_p50, result.refusal_p99) == (3.0, pytest.approx(0.002))


def test_a_chart_is_xml_with_every_point() -> None:
    image = ElementTree.fromstring(chart("a < b", "x", "y", {"one": [(0, 1), (5, 2.5)], "two": [(1, 0)]}))
    space = "{http://www.w3.org/2000/svg}"
    assert len(image.findall(f"{space}circle")) == 3 and len(image.findall(f"{space}polyline")) == 2
    assert "a < b" in [text.text for text in image.findall(f"{space}text")]
    heights = [float(circle.attrib["cy"]) for circle in image.findall(f"{space}circle")]
    assert heights[1] < heights[0] < heights[2]  # up is more
    with pytest.raises(ValueError):
        chart("", "", "", {"nothing": []})


@pytest.mark.parametrize(("largest", "step"), [(8.0, 1.0), (8.1, 2.0), (0.3, 0.05), (3000.0, 500.0)])
def test_steps_of_an_axis(largest: float, step: float) -> None:
    assert nice_step(largest) == pytest.approx(step)
