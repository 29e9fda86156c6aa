"""Clients that have never seen our stubs call the server by reflection: grpcurl (v1alpha), buf (v1)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server

PROTOS = Path(__file__).resolve().parents[2] / "protos"
REQUEST = json.dumps(
    {
        "prompt": {"text": "The capital of France is"},
        "sampling": {"temperature": 0},
        "stopping": {"maxTokens": 16},
    }
)
SERVICES = {
    "salver.v1.EncodingService",
    "salver.v1.GenerationService",
    "salver.v1.ModelService",
    "salver.v1.TokenizationService",
    "grpc.health.v1.Health",
}


def run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def camel(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with protobuf's JSON names: older grpcurls print the names of the .proto file."""
    return {re.sub("_([a-z])", lambda m: m.group(1).upper(), name): value for name, value in pairs}


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of `text`, one after the other."""
    decoder, found, at = json.JSONDecoder(object_pairs_hook=camel), [], 0
    while at < len(text.rstrip()):
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    return found


def expected(server: Server) -> tuple[str, list[int]]:
    (completion,) = server.generate("The capital of France is", max_tokens=16).completions
    return completion.text, list(completion.token_ids)


@pytest.mark.tool("grpcurl")
def test_grpcurl_lists_and_describes(server: Server, tool: str) -> None:
    assert set(run(tool, "-plaintext", server.address, "list").split()) >= SERVICES
    described = run(tool, "-plaintext", server.address, "describe", "salver.v1.GenerationService")
    assert "rpc StreamGenerate ( .salver.v1.StreamGenerateRequest )" in described
    assert "temperature" in run(tool, "-plaintext", server.address, "describe", "salver.v1.SamplingParams")


@pytest.mark.tool("grpcurl")
def test_grpcurl_generates(server: Server, tool: str) -> None:
    text, tokens = expected(server)
    path = "salver.v1.GenerationService/Generate"
    (reply,) = objects(run(tool, "-plaintext", "-d", REQUEST, server.address, path))
    (completion,) = reply["completions"]
    assert (completion["text"], completion["tokenIds"]) == (text, tokens)
    assert reply["usage"]["promptTokens"] == len(reply["promptTokenIds"])
    assert reply["numericsId"]


@pytest.mark.tool("grpcurl")
def test_grpcurl_streams(server: Server, tool: str) -> None:
    text, tokens = expected(server)
    path = "salver.v1.GenerationService/StreamGenerate"
    messages = objects(run(tool, "-plaintext", "-d", REQUEST, server.address, path))
    deltas = [completion for message in messages for completion in message.get("completions", [])]
    assert "".join(delta.get("text", "") for delta in deltas) == text
    assert [token for delta in deltas for token in delta.get("tokenIds", [])] == tokens
    assert "usage" in messages[-1] and "usage" not in messages[0]
    assert deltas[-1]["finishReason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")


@pytest.mark.tool("grpcurl")
def test_grpcurl_shows_what_was_wrong(server: Server, tool: str) -> None:
    done = subprocess.run(
        [
            *(tool, "-plaintext", "-d", '{"prompt":{"text":"a"},"sampling":{"temperature":-1}}'),
            *(server.address, "salver.v1.GenerationService/Generate"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr
    assert "sampling.temperature" in done.stderr


@pytest.mark.tool("buf")
def test_buf_curl_generates(server: Server, tool: str) -> None:
    text, tokens = expected(server)
    url = f"http://{server.address}/salver.v1.GenerationService/Generate"
    reply = json.loads(run(tool, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", REQUEST, url))
    assert reply["completions"][0]["text"] == text
    assert reply["completions"][0]["tokenIds"] == tokens


@pytest.mark.tool("buf")
def test_buf_curl_lists_the_services(server: Server, tool: str) -> None:
    listed = run(
        *(tool, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-services"),
        f"http://{server.address}",
    )
    assert set(listed.split()) >= SERVICES


@pytest.mark.tool("buf")
def test_the_protos_are_lint_clean(tool: str) -> None:
    run(tool, "lint", str(PROTOS))
