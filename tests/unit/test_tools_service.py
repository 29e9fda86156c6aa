"""Tools in Chat over a real port: what the template is given, what is read of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_service import EOS, TOKENIZER, Code, failure, fields_of, run, service

from salver.v1 import (
    generation_pb2,
)

TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} use <tool_call>{% endif %}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}"
    "({{ c.id }} {{ c.function.name }} {{ c.function.arguments.x }})"
    "{% endfor %}{{ m.tool_call_id }}{% endfor %}[assistant]<think>"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": [1, 2]}}\n</tool_call>'


def tool_request(kind: Any = generation_pb2.ChatRequest, **fields: Any) -> Any:
    add = generation_pb2.Tool(name="add", description="sums", parameters='{"type": "object"}')
    user = generation_pb2.Message(role=generation_pb2.ROLE_USER, content="1 + 2?")
    return kind(**{"messages": [user], "tools": [add], "separate_reasoning": True, **fields})


def test_calls_of_tools_are_read_from_the_answer_and_streamed() -> None:
    async def test() -> None:
        async with service(template=TOOL_TEMPLATE.replace("{{ tools | tojson }}", "")) as served:
            served.engine.answer = [*TOKENIZER.encode(f"I add.</think>\n\nSo: {CALL}"), EOS]
            reply = await served.generation.Chat(tool_request())
            (whole,) = reply.completions
            assert (whole.reasoning, whole.content) == ("I add.", "So: ")
            (call,) = whole.tool_calls
            assert (call.index, call.name, call.arguments) == (0, "add", '{"x": [1, 2]}')
            assert len(call.id) == 9
            assert whole.text == TOKENIZER.decode(whole.token_ids), "the text is all that the model wrote"
            asked = tool_request(generation_pb2.StreamChatRequest)
            asked.sampling.seed = reply.seed

            async def streamed(request: Any) -> tuple[str, str, str, list[Any]]:
                messages = [message async for message in served.generation.StreamChat(request)]
                parts = [message.completions[0] for message in messages if message.completions]
                calls = [c for part in parts for c in part.tool_calls]
                text, reasoning, content = (
                    "".join(getattr(part, name) for part in parts)
                    for name in ("text", "reasoning", "content")
                )
                return text, reasoning, content, calls

            text, reasoning, content, calls = await streamed(asked)
            assert (text, reasoning, content) == (whole.text, whole.reasoning, whole.content)
            assert calls[0].name == "add" and calls[0].id == call.id
            assert "".join(c.arguments for c in calls) == call.arguments
            for cut in range(1, len(whole.token_ids) - 1, 3):
                asked.resume.Clear()
                asked.resume.samples.add(index=0, token_ids=whole.token_ids[:cut])
                asked.resume.seed, asked.resume.numerics_id = reply.seed, reply.numerics_id
                rest = await streamed(asked)
                assert all(a.endswith(b) for a, b in zip((text, reasoning, content), rest[:3], strict=True))
                assert call.arguments.endswith("".join(c.arguments for c in rest[3]))

    run(test)


def test_tools_and_their_answers_reach_the_template() -> None:
    async def test() -> None:
        async with service(template=TOOL_TEMPLATE) as served:
            Message = generation_pb2.Message
            asked = tool_request()
            asked.messages.append(Message(role=generation_pb2.ROLE_ASSISTANT))
            asked.messages[1].tool_calls.add(id="c1", name="add", arguments='{"x": 5}')
            asked.messages.append(Message(role=generation_pb2.ROLE_TOOL, content="3", tool_call_id="c1"))
            asked.stopping.max_tokens = 4
            await served.generation.Chat(asked)
            prompt = TOKENIZER.decode(served.engine.requests[0].prompt_token_ids)
            assert prompt.endswith("[user]1 + 2?[assistant](c1 add 5)[tool]3c1[assistant]<think>")
            shown = {"name": "add", "description": "sums", "parameters": {"type": "object"}}
            assert json.loads(prompt.partition(" use")[0]) == [{"type": "function", "function": shown}]

    run(test)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}, {"name": "a"}]}, "tools[1].name"),
        ({"tools": [{"name": "a", "parameters": "[1]"}]}, "tools[0].parameters"),
        ({"tools": [], "tool_choice": {"name": "add"}}, "tool_choice"),
        ({"tool_choice": {"name": "subtract"}}, "tool_choice.name"),
        ({"tool_choice": {"mode": 9}}, "tool_choice.mode"),
        ({"structured_output": {"regex": "a"}}, "structured_output"),
        ({"tool_choice": {"mode": 3}, "stopping": {"stop": ["x"]}}, "stopping.stop"),
        ({"messages": [{"role": 2, "tool_calls": [{"name": "a"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": 2, "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": 3, "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "messages[0].tool_calls[0].arguments",
        ),
    ],
    ids=str,
)
def test_wrong_tools(fields: dict[str, Any], path: str) -> None:
    async def test() -> None:
        async with service(template=TOOL_TEMPLATE) as served:
            code, details = await failure(served.generation.Chat(tool_request(**fields)))
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, [path])

    run(test)


def test_a_template_without_tools_is_not_given_any() -> None:
    async def test() -> None:
        async with service() as served:
            code, _ = await failure(served.generation.Chat(tool_request()))
            assert code is Code.FAILED_PRECONDITION

    run(test)
