"""Content, reasoning and calls, whatever the pieces that the text comes in."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salver.model.assistant_text import AssistantText, ToolFormat, tool_format

Read = tuple[str, str, list[tuple[str, str]]]


def read(pieces: Sequence[str], tools: ToolFormat | None, **options: bool) -> Read:
    text = AssistantText(tools, **{"reasoning": False, **options})
    content, reasoning = "", ""
    calls: dict[int, list[str]] = {}
    for said in [*map(text.add, pieces), text.finish()]:
        content += said.content
        reasoning += said.reasoning
        for delta in said.calls:
            assert bool(delta.name) == (delta.index not in calls), "the name comes first, and once"
            call = calls.setdefault(delta.index, [delta.name, ""])
            call[1] += delta.arguments
    assert list(calls) == list(range(len(calls)))
    return content, reasoning, [(name, arguments) for name, arguments in calls.values()]


ARGUMENTS = '{"city": "Lübeck \\"}{", "days": [1, {"a": []}]}'
CALL = '{"name": "weather", "arguments": ' + ARGUMENTS + "}"
LLAMA = '{"name": "weather", "parameters": ' + ARGUMENTS + "}"
FOUND = ("weather", ARGUMENTS)
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
CASES = [
    (HERMES, ToolFormat.HERMES, ("", [FOUND])),
    (f"I look.\n{HERMES}\n{HERMES}", ToolFormat.HERMES, ("I look.\n", [FOUND, FOUND])),
    (f"{HERMES} and more", ToolFormat.HERMES, (" and more", [FOUND])),
    ("a < b, <tool_call", ToolFormat.HERMES, ("a < b, <tool_call", [])),
    ("<tool_call>nothing</tool_call>", ToolFormat.HERMES, ("<tool_call>nothing</tool_call>", [])),
    ('<tool_call>{"name": 5}</tool_call>', ToolFormat.HERMES, ('<tool_call>{"name": 5}</tool_call>', [])),
    (HERMES.removesuffix("</tool_call>"), ToolFormat.HERMES, ("", [FOUND])),
    (HERMES[:60], ToolFormat.HERMES, ("", [("weather", HERMES[:60].partition('"arguments": ')[2])])),
    (LLAMA, ToolFormat.LLAMA3, ("", [FOUND])),
    (f"\n{LLAMA}; {LLAMA}", ToolFormat.LLAMA3, ("", [FOUND, FOUND])),
    ('{"type": "function", ' + LLAMA[1:], ToolFormat.LLAMA3, ("", [FOUND])),
    ('{"a": 1}', ToolFormat.LLAMA3, ('{"a": 1}', [])),
    ("Hello {", ToolFormat.LLAMA3, ("Hello {", [])),
    (f"[{CALL}, {CALL}]", ToolFormat.MISTRAL, ("", [FOUND, FOUND])),
    (f"[TOOL_CALLS] [{CALL}]", ToolFormat.MISTRAL, ("", [FOUND])),
    ("[1, 2]", ToolFormat.MISTRAL, ("[1, 2]", [])),
    ("[TOOL_CALLS]?", ToolFormat.MISTRAL, ("[TOOL_CALLS]?", [])),
    ("[", ToolFormat.MISTRAL, ("[", [])),
    ("", ToolFormat.MISTRAL, ("", [])),
    (HERMES, None, (HERMES, [])),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_calls_and_content(case: int, data: st.DataObject) -> None:
    text, tools, (content, calls) = CASES[case]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, tools) == (content, "", calls)
    assert read(list(text), tools) == (content, "", calls)
    for _, arguments in calls:
        if arguments == ARGUMENTS:
            json.loads(arguments)
    thought = f"<think>\nHm <b> </thin\n</think>\n\n{text}"
    assert read(list(thought), tools, reasoning=True)[:2] == (content, "\nHm <b> </thin\n")


def test_a_call_is_told_as_it_is_written() -> None:
    text = AssistantText(ToolFormat.HERMES, reasoning=False)
    told = [delta for character in HERMES for delta in text.add(character).calls]
    assert told[0].name == "weather"
    assert [delta.arguments for delta in told[1:]] == list(ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>so</think>\n\nyes", False, ("yes", "so")),
        ("so</think>yes", True, ("yes", "so")),
        ("never ends", True, ("", "never ends")),
        ("  <thi", False, ("  <thi", "")),
        ("no thought</think>", False, ("no thought</think>", "")),
        ("<think></think>", False, ("", "")),
    ],
)
def test_reasoning(text: str, inside: bool, expected: tuple[str, str]) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, None, reasoning=True, inside_reasoning=inside)[:2] == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='<>/tol_ca{}[]":,nme 1\\', max_size=40), st.sampled_from([None, *ToolFormat]))
def test_nothing_is_lost_of_what_is_no_call(text: str, tools: ToolFormat | None) -> None:
    found = read(list(text), tools)
    assert found == read([text], tools)
    if not found[2]:
        assert found[0].strip() == text.strip()


def test_formats_of_templates() -> None:
    assert tool_format("{{ tools }} <tool_call>") is ToolFormat.HERMES
    assert tool_format("{{ tools }} [TOOL_CALLS]") is ToolFormat.MISTRAL
    assert tool_format('{{ tools }} {"name": f, "parameters": p}') is ToolFormat.LLAMA3
    assert tool_format("<tool_call>") is None
    assert tool_format("{{ tools }}") is None
