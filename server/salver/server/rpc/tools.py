"""Tools of a chat: checked, told to the template, and what the model calls of them read from its text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from salver.model.assistant_text import THINK, AssistantText, Said, ToolFormat, tool_format
from salver.model.tokenizer import Tokenizer
from salver.server.rpc.errors import Violation, task_not_supported
from salver.server.rpc.served import ServedModel
from salver.v1 import common_pb2, generation_pb2

MAX_TOOLS = 128
MAX_SCHEMA = 1 << 18
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_Choice = generation_pb2.ToolChoice


def check_tools(request: Any, model: ServedModel) -> list[Violation]:
    """What is wrong with `tools` and `tool_choice`.

    Raises ApiError (FAILED_PRECONDITION) where the checkpoint's template knows no tools.
    """
    found = []
    choice = request.tool_choice
    if choice.mode not in _Choice.Mode.values():
        found.append(Violation("tool_choice.mode", f"{choice.mode} is not a mode"))
    if not request.tools:
        if choice.name or choice.mode == _Choice.MODE_REQUIRED:
            found.append(Violation("tool_choice", "needs tools"))
        return found
    if _format_of(model) is None:
        raise task_not_supported(
            f"the chat template of {model.name!r} knows no tools that are called in a known form"
        )
    if request.HasField("structured_output"):
        found.append(Violation("structured_output", "cannot be set together with tools"))
    if len(request.tools) > MAX_TOOLS:
        found.append(Violation("tools", f"must be at most {MAX_TOOLS}"))
    names: set[str] = set()
    for position, tool in enumerate(request.tools[:MAX_TOOLS]):
        field = f"tools[{position}]"
        if not _NAME.fullmatch(tool.name):
            found.append(Violation(f"{field}.name", "must be 1 to 64 letters, digits, _, . or -"))
        elif tool.name in names:
            found.append(Violation(f"{field}.name", f"{tool.name!r} is there twice"))
        names.add(tool.name)
        if len(tool.parameters) > MAX_SCHEMA or not isinstance(_schema(tool), dict):
            found.append(Violation(f"{field}.parameters", "must be the text of a JSON Schema, an object"))
    if choice.name and choice.name not in names:
        found.append(Violation("tool_choice.name", "is none of the tools"))
    if choice.name and choice.mode == _Choice.MODE_NONE:
        found.append(Violation("tool_choice.name", "cannot be set together with MODE_NONE"))
    return found


def check_calls(messages: Sequence[generation_pb2.Message]) -> list[Violation]:
    """What is wrong with the calls that a conversation has already."""
    found = []
    for position, message in enumerate(messages):
        if message.tool_calls and message.role != generation_pb2.ROLE_ASSISTANT:
            found.append(Violation(f"messages[{position}].tool_calls", "are the assistant's"))
        if message.tool_call_id and message.role != generation_pb2.ROLE_TOOL:
            found.append(Violation(f"messages[{position}].tool_call_id", "is a tool's"))
        for number, call in enumerate(message.tool_calls):
            if not isinstance(_json(call.arguments or "{}"), dict):
                found.append(
                    Violation(f"messages[{position}].tool_calls[{number}].arguments", "must be a JSON object")
                )
    return found


def for_template(tools: Sequence[generation_pb2.Tool]) -> list[dict[str, Any]] | None:
    """The tools as templates take them; None without any."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": _schema(tool)},
        }
        for tool in tools
    ] or None


def turn_of(message: generation_pb2.Message, role: str) -> dict[str, Any]:
    """A message as templates take it."""
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _json(call.arguments or "{}")},
            }
            for call in message.tool_calls
        ]
    return turn


def must_call(request: Any) -> bool:
    """Whether the answer must be a call of a tool."""
    if not hasattr(request, "tools") or not request.tools:
        return False
    return bool(request.tool_choice.name) or request.tool_choice.mode == _Choice.MODE_REQUIRED


def grammar_of_calls(request: Any, model: ServedModel) -> str:
    """The grammar (Lark's syntax) of an answer that must call a tool."""
    choice = request.tool_choice
    of_model = _format_of(model)
    key = "parameters" if of_model is ToolFormat.LLAMA3 else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: _schema(tool)},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in request.tools
        if choice.name in ("", tool.name)
    ]
    call: dict[str, Any] = {"anyOf": calls} if len(calls) > 1 else calls[0]
    if of_model is ToolFormat.HERMES:
        return f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {_compact(call)}\n'
    if of_model is ToolFormat.LLAMA3:
        return f"start: %json {_compact(call)}\n"
    marks = [i for i in model.tokenizer.special_token_ids if model.tokenizer.token(i) == "[TOOL_CALLS]"]
    mark = f"<[{marks[0]}]>" if marks else '"[TOOL_CALLS]"'
    calls_of_list = {"type": "array", "items": call, "minItems": 1}
    return f"start: {mark} calls\ncalls: %json {_compact(calls_of_list)}\n"


def _compact(schema: dict[str, Any]) -> str:
    """Of JSON written as models learned it: a blank after commas and colons, and no others."""
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({**schema, "x-guidance": layout})


class AnswerReader:
    """Reads every sample of one answer, for a chat that asks for it."""

    def __init__(
        self, request: Any, model: ServedModel, prompt: str, outputs: dict[int, Sequence[int]]
    ) -> None:
        """`prompt` is the conversation as the template wrote it, `outputs` the resumed tokens of samples."""
        tools = _format_of(model) if request.tools and request.tool_choice.mode != _Choice.MODE_NONE else None
        inside = not must_call(request) and prompt.rstrip().endswith(THINK)

        def reader() -> AssistantText:
            return AssistantText(tools, reasoning=request.separate_reasoning, inside_reasoning=inside)

        self._reader = reader
        self._tokenizer = model.tokenizer
        self._outputs = outputs
        self._samples: dict[int, AssistantText] = {}

    def read(self, completion: common_pb2.Completion, seed: int) -> None:
        """Fills in what a delta's text says."""
        index = completion.index
        sample = self._samples.get(index)
        if sample is None:
            sample = self._samples[index] = self._reader()
            if completion.text_offset:
                sample.add(_text_of(self._outputs[index], self._tokenizer)[: completion.text_offset])
        parts = [sample.add(completion.text)]
        if completion.finish_reason:
            parts.append(sample.finish())
        for said in parts:
            _tell(said, completion, seed)


def wants_reading(request: Any) -> bool:
    """Whether a chat asks for more than text."""
    return bool(request.tools) or bool(request.separate_reasoning)


def _tell(said: Said, completion: common_pb2.Completion, seed: int) -> None:
    completion.content += said.content
    completion.reasoning += said.reasoning
    for delta in said.calls:
        known = completion.tool_calls
        if not known or known[-1].index != delta.index:
            known.add(index=delta.index)
        call = known[-1]
        if delta.name:
            call.name = delta.name
            # A function of the request, so that a resumed stream says the same. Mistral wants nine letters.
            call.id = hashlib.blake2b(f"{seed} {completion.index} {delta.index}".encode()).hexdigest()[:9]
        call.arguments += delta.arguments


def _text_of(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(token_ids, continuation=True)


def _format_of(model: ServedModel) -> ToolFormat | None:
    return None if model.chat_template is None else tool_format(model.chat_template.source)


def _schema(tool: Message) -> Any:
    parameters = tool.parameters  # type: ignore[attr-defined]
    return _json(parameters) if parameters else {"type": "object"}


def _json(text: str) -> Any:
    """The value of a JSON text; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
