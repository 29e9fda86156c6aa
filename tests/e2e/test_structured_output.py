"""Structured output through the client, the command line, and a worker that dies in the middle."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from support.checkpoints import write_tiny_llama, write_tokenizer
from support.serving import SALVER, Server

from salver.client import Client, FinishReason, InvalidArgument, Origin, Tool, ToolCall

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 99}, "s": {"enum": ["a", "b"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
CHOICES = ["the first", "the second"]
LONG = "[a-z]{120}[0-9]{20}"


def test_what_stops_is_what_was_asked_for(tiny: Server) -> None:
    with Client(tiny.address) as client:
        found = client.generate("Say", json_schema=SCHEMA, max_tokens=100, n=4, temperature=1.5, seed=3)
        assert [c.finish_reason for c in found.completions] == [FinishReason.STOP] * 4
        for completion in found.completions:
            jsonschema.validate(json.loads(completion.text), SCHEMA)
        assert found.configuration["temperature"].origin is Origin.REQUEST
        assert found.configuration["top_p"].value == 1.0
        with client.stream_chat("Say", choice=CHOICES, max_tokens=100, temperature=2.0) as stream:
            pieces = [message.text for message in stream]
        assert "".join(pieces) in CHOICES and stream.result.completions[0].finish_reason is FinishReason.STOP
        short = client.generate("Say", regex=LONG, max_tokens=5)
        assert short.completions[0].finish_reason is FinishReason.LENGTH
        assert re.fullmatch("[a-z]+", short.text)


def test_a_schema_that_explodes_is_refused(tiny: Server) -> None:
    anything = [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(9)]} for i in range(9)]
    with Client(tiny.address) as client:
        with pytest.raises(InvalidArgument) as refusal:
            client.generate("Say", json_schema={"allOf": anything}, max_tokens=5)
        assert refusal.value.violations[0].field == "structured_output.json_schema"
        assert client.generate("Say", max_tokens=3).completions[0].token_ids


def test_a_worker_that_dies_takes_no_grammar_along(
    start_server: Callable[..., Server], tiny_llama: Path
) -> None:
    server = start_server(tiny_llama)
    options = {"regex": LONG, "max_tokens": 300, "temperature": 1.2, "seed": 5}
    with Client(server.address) as client:
        whole = client.generate("Say", **options)
        assert re.fullmatch(LONG, whole.text)
        with client.stream_generate("Say", **options) as stream:
            for _ in range(3):
                next(stream)
            server.worker.kill()
            for _ in stream:
                pass
        assert stream.result.text == whole.text
        assert stream.result.completions[0].token_ids == whole.completions[0].token_ids
        assert client.server_info().worker_restarts == 1


def test_from_the_command_line(tiny: Server, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))

    def said(*flags: str) -> str:
        # Seeded: a text that is cut at its limit need not validate.
        command = [SALVER, "generate", "Say", "--address", tiny.address, "--max-tokens", "100", "--seed", "3"]
        done = subprocess.run([*command, *flags], check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    jsonschema.validate(json.loads(said("--json-schema", str(file))), SCHEMA)
    assert said("--choice", *CHOICES).strip() in CHOICES


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} use <tool_call>{% endif %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}"
)


def test_a_call_that_must_be_made_follows_its_schema(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    write_tokenizer(write_tiny_llama(tmp_path, context=1024), TOOL_TEMPLATE)
    server = start_server(tmp_path)
    tools = [Tool("add", "sums", SCHEMA), Tool("stop", "", {"type": "object", "additionalProperties": False})]
    with Client(server.address) as client:

        def calls(choice: str) -> list[ToolCall]:
            with client.stream_chat(
                "Go", tools=tools, tool_choice=choice, temperature=1.5, seed=4, max_tokens=200
            ) as stream:
                for _ in stream:
                    pass
            (completion,) = stream.result.completions
            assert completion.finish_reason is FinishReason.STOP and completion.content == ""
            return list(completion.tool_calls)

        (call,) = calls("add")
        assert call.name == "add"
        jsonschema.validate(call.parsed(), SCHEMA)
        (call,) = calls("required")
        assert call.name in ("add", "stop")
