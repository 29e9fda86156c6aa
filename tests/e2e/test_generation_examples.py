"""The examples of docs/generation.md run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import write_tiny_llama, write_tokenizer
from support.serving import Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} use <tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)


@pytest.fixture(scope="module")
def server(start_module_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    directory = write_tiny_llama(tmp_path_factory.mktemp("tools"), context=1024)
    write_tokenizer(directory, TEMPLATE)
    return start_module_server(directory)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, server: Server) -> None:
    example = EXAMPLES[number]
    assert "127.0.0.1:50051" in example
    exec(compile(example.replace("127.0.0.1:50051", server.address), f"example {number}", "exec"), {})
