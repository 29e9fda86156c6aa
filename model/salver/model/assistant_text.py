"""What an assistant's text says: content, reasoning, calls of tools. Text comes in pieces of any size.

A call is told as it is written: its name, then its arguments piece by piece. What only looks like a
call is content, and nothing is lost: the three together hold all of the text but the marks.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

THINK, END_OF_THINK = "<think>", "</think>"


class ToolFormat(enum.Enum):
    """How checkpoints write calls.

    HERMES (Qwen too): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere.
    LLAMA3: the text is `{"name": ..., "parameters": {...}}`, several with `;` between them.
    MISTRAL: the text is `[{"name": ..., "arguments": {...}}, ...]`, after `[TOOL_CALLS]`.
    """

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template asks the model for; None where it knows no tools or another one."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL
    if "<tool_call>" in template:
        return ToolFormat.HERMES
    if "<|python_tag|>" in template or "ipython" in template or '"parameters"' in template:
        return ToolFormat.LLAMA3
    return None


@dataclass(slots=True)
class CallDelta:
    """What was added to a call; `name` comes with its first delta."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """What a piece of text added."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


_HEADER = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# Every beginning of a header; what does not match it can never become a call.
_MAX_HEADER = 1024
_SEPARATORS = {ToolFormat.HERMES: "", ToolFormat.LLAMA3: ";,", ToolFormat.MISTRAL: ","}


class AssistantText:
    """One answer. `add` its pieces, then `finish`."""

    def __init__(self, tools: ToolFormat | None, *, reasoning: bool, inside_reasoning: bool = False) -> None:
        """`reasoning`: whether it is told apart; `inside_reasoning`: the prompt has begun it."""
        self._tools = tools
        self._text = ""  # not told yet
        self._said = Said()
        self._num_calls = 0
        self._scan = _JsonEnd()
        self._undo = ""  # of a call whose header is read: nothing is told before
        start = self._content if tools is ToolFormat.HERMES or tools is None else self._beginning
        self._next: Callable[[bool], bool] = start
        self._after_reasoning = start
        if reasoning:
            self._next = self._reasoning if inside_reasoning else self._before_reasoning

    def add(self, text: str) -> Said:
        """What became certain."""
        self._text += text
        return self._told(last=False)

    def finish(self) -> Said:
        """What was held back."""
        return self._told(last=True)

    def _told(self, last: bool) -> Said:
        while self._next(last):
            pass
        said, self._said = self._said, Said()
        return said

    # Each state takes what it can of the text; True when another state may go on.

    def _before_reasoning(self, last: bool) -> bool:
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._text = text[len(THINK) :]
            self._next = self._reasoning
            return True
        if THINK.startswith(text) and not last:
            return False
        self._next = self._after_reasoning
        return True

    def _reasoning(self, last: bool) -> bool:
        before, mark, after = self._text.partition(END_OF_THINK)
        kept = 0 if mark or last else _overlap(before, END_OF_THINK)
        self._said.reasoning += before[: len(before) - kept]
        self._text = before[len(before) - kept :]
        if not mark:
            return False
        self._text = after
        self._next = self._blank
        return True

    def _blank(self, last: bool) -> bool:
        """The line breaks after the reasoning belong to nothing."""
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        self._next = self._after_reasoning
        return True

    def _content(self, last: bool) -> bool:
        if self._tools is not ToolFormat.HERMES:
            self._said.content += self._text
            self._text = ""
            return False
        before, mark, after = self._text.partition("<tool_call>")
        kept = 0 if mark or last else _overlap(before, "<tool_call>")
        told = before[: len(before) - kept]
        self._said.content += told
        self._text = before[len(before) - kept :]
        if not mark:
            return False
        self._undo, self._text = mark, after
        self._next = self._header
        return True

    def _beginning(self, last: bool) -> bool:
        """Of a text that is calls, or content."""
        text = self._text.lstrip()
        if self._tools is ToolFormat.MISTRAL:
            if "[TOOL_CALLS]".startswith(text) and not last:
                return False
            text = text.removeprefix("[TOOL_CALLS]").lstrip()
        opening = "[" if self._tools is ToolFormat.MISTRAL else "{"
        if not text:
            return self._give_up() if last and self._text else False
        if not text.startswith(opening):
            return self._give_up()
        self._undo = self._text[: len(self._text) - len(text)]
        if opening == "[":
            self._undo, text = self._undo + "[", text[1:]
        self._text = text
        self._next = self._header
        return True

    def _header(self, last: bool) -> bool:
        match = _HEADER.match(self._text)
        if match is not None:
            try:
                name = json.loads(match[1])
            except ValueError:
                return self._give_up()
            self._said.calls.append(CallDelta(self._num_calls, name))
            self._text = self._text[match.end() :]
            self._undo = ""
            self._scan = _JsonEnd()
            self._next = self._arguments
            return True
        if last or len(self._text) > _MAX_HEADER or not _may_become_header(self._text):
            return self._give_up()
        return False

    def _arguments(self, last: bool) -> bool:
        end = self._scan.find(self._text)
        taken = self._text if end is None else self._text[:end]
        if taken:
            self._said.calls.append(CallDelta(self._num_calls, "", taken))
        self._text = self._text[len(taken) :]
        if end is None:
            return False
        self._num_calls += 1
        self._next = self._after_call
        return True

    def _after_call(self, last: bool) -> bool:
        """The end of the call's object, and its mark or another call."""
        text = self._text.lstrip()
        if text.startswith("}"):
            text = text[1:].lstrip()
        elif text:
            return self._give_up()
        if self._tools is ToolFormat.HERMES:
            if text.startswith("</tool_call>"):
                self._text = text[len("</tool_call>") :].lstrip("\n")
                self._next = self._between
                return True
            if "</tool_call>".startswith(text):
                if last:
                    self._text = ""
                return False
            return self._give_up()
        text = text.lstrip(_SEPARATORS[self._tools or ToolFormat.LLAMA3] + " \n")
        if text.startswith("{"):
            self._text, self._undo = text, ""
            self._next = self._header
            return True
        if not text or (self._tools is ToolFormat.MISTRAL and text == "]"):
            if last:
                self._text = ""
            return False
        self._text = text.removeprefix("]") if self._tools is ToolFormat.MISTRAL else text
        self._undo = ""
        return self._give_up()

    def _between(self, last: bool) -> bool:
        """Line breaks between calls belong to nothing."""
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        self._next = self._content
        return True

    def _give_up(self) -> bool:
        """It is no call: what was held back is content, and all that follows, but for further marks."""
        self._said.content += self._undo
        self._undo = ""
        if self._tools is not ToolFormat.HERMES:
            self._tools = None
        self._next = self._content
        return True


class _JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """The place after the object's end in this piece; None while it goes on."""
        for place, character in enumerate(piece):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def _may_become_header(text: str) -> bool:
    """Whether more text can make it the beginning of a call: it is one with what is missing filled in."""
    squeezed = text.lstrip()
    return any(_HEADER.match(squeezed + ending) is not None for ending in _ENDINGS)


# Each place where a header can be cut, and the shortest way to its end.
_FULL = (
    '{"name":"n","arguments":{',
    '{"name":"n","parameters":{',
    '{"type":"function","name":"n","arguments":{',
)
_ENDINGS = tuple(
    sorted(
        {full[cut:] for full in _FULL for cut in range(len(full) + 1)}
        | {'","arguments":{', 'n","arguments":{'}
    )
)
