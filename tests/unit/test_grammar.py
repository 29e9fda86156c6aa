"""Grammars without a model: whatever tokens are drawn under the masks, the text is what was asked for."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bookkeeping import request
from support.checkpoints import EOS, write_tokenizer

from salver.model.assistant_text import AssistantText, ToolFormat
from salver.model.chat_template import ChatTemplate
from salver.model.tokenizer import Tokenizer
from salver.server.engine.grammar import Grammars, load_vocabulary
from salver.server.engine.sequence import Sequence
from salver.server.grammar_check import check, grammar_of
from salver.server.rpc.tools import grammar_of_calls
from salver.v1 import generation_pb2

PROMPT = [5, 6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, None)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_directory(checkpoint)


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    return Grammars(lambda: load_vocabulary(checkpoint))


def sequence(grammar: str, output: list[int] | None = None) -> Sequence:
    from dataclasses import replace

    item = replace(request(1, PROMPT), grammar=grammar)
    return Sequence(item, 0, tuple(output or ()), (0, 0.0, 0.0, 1, 0))


def allowed(grammars: Grammars, item: Sequence, draft: tuple[int, ...] = ()) -> list[set[int]]:
    (rows,) = grammars.masks([(item, draft)])
    assert rows is not None
    return [{int(i) for i in np.unpackbits(row, bitorder="little").nonzero()[0]} for row in rows]


def walk(grammars: Grammars, tokenizer: Tokenizer, grammar: str, rng: random.Random, most: int = 60) -> str:
    """Random tokens that the masks allow, and their ends as soon as it may end after `most` of them."""
    item = sequence(grammar)
    for count in range(4000):
        (tokens,) = allowed(grammars, item)
        assert tokens and max(tokens) < tokenizer.vocab_size and 0 not in tokens
        if EOS in tokens and (count >= most or rng.random() < 0.3 or tokens == {EOS}):
            break
        choices = sorted(tokens - {EOS})
        if count >= most:  # brings strings, lists and numbers to their end
            endings = [t for t in choices if tokenizer.token(t) in tuple('"]}0')]
            choices = endings or choices
        item.token_ids.append(rng.choice(choices))
    else:
        pytest.fail("it does not end")
    return tokenizer.decode(item.token_ids[len(PROMPT) :])


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.one_of(
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
        st.builds(
            lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, *[st.integers(0, 50)] * 2
        ),
        st.sampled_from(
            [{"type": "boolean"}, {"type": "null"}, {"enum": ["a", "bc", 3, None]}, {"const": {"x": [1]}}]
        ),
        st.sampled_from(
            [{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "string", "format": "date"}]
        ),
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        properties = st.dictionaries(st.sampled_from(["a", "b c", "é", '"']), inner, max_size=3)
        return st.one_of(
            properties.flatmap(
                lambda p: st.builds(
                    lambda required, more: {
                        "type": "object", "properties": p, "required": sorted(required),
                        "additionalProperties": more,
                    },
                    st.sets(st.sampled_from(sorted(p))) if p else st.just(set()),
                    st.sampled_from([False, {"type": "integer", "maximum": 99, "minimum": 0}]),
                )
            ),
            st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner, st.integers(0, 3)),
            st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        )  # fmt: skip

    return st.recursive(leaves, larger, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(schemas(), st.integers(0, 1000))
def test_whatever_is_drawn_validates(
    grammars: Grammars, tokenizer: Tokenizer, schema: Any, seed: int
) -> None:
    answer = check({"form": "json_schema", "value": json.dumps(schema), "outputs": []}, grammars.warm())
    text = walk(grammars, tokenizer, answer["grammar"], random.Random(seed))
    # RFC 3339 has a year 0, a leap year as 2000 was. Python's dates begin with 1.
    text = text.replace('"0000-', '"2000-')
    jsonschema.validate(
        json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_other_form(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)

    def text(form: str, value: Any) -> str:
        return walk(grammars, tokenizer, grammar_of(form, value), rng)

    assert isinstance(json.loads(text("json_object", True)), dict)
    assert re.fullmatch(r"[0-9]{2,4}-(x|yz)+", text("regex", r"[0-9]{2,4}-(x|yz)+"))
    assert text("choice", ["yes", 'no "way"\n', "naïve"]) in ("yes", 'no "way"\n', "naïve")
    lark = 'start: item ("," item)*\nitem: /[a-z]/ | "(" start ")"'
    found = text("grammar", lark)
    while (shorter := re.sub(r"\([a-z](,[a-z])*\)", "a", found)) != found:
        found = shorter
    assert re.fullmatch("[a-z](,[a-z])*", found)


def test_the_state_is_a_function_of_the_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammar_of("regex", "(ab|cd){3}the")
    ids = tokenizer.encode("abcdabthe")
    item, seen = sequence(grammar), []
    for token_id in ids:
        seen += allowed(grammars, item)
        item.token_ids.append(token_id)
    seen += allowed(grammars, item)
    assert seen[-1] == {EOS}
    for cut in range(len(ids) + 1):
        assert allowed(grammars, sequence(grammar, ids[:cut])) == seen[cut : cut + 1], "resumed"
        item = sequence(grammar, ids[:cut])
        assert allowed(grammars, item, tuple(ids[cut:])) == seen[cut:], "with drafts"
        assert allowed(grammars, item) == seen[cut : cut + 1], "and after them"
    wrong = sequence(grammar, ids[:2])
    assert allowed(grammars, wrong, (ids[0], ids[0], ids[1]))[:2] == [seen[2], seen[1]]


def test_tokens_that_do_not_follow_leave_nothing(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammar_of("choice", ["yes", "no"])
    lost = sequence(grammar, tokenizer.encode("x"))
    neighbour = sequence(grammar)
    rows = grammars.masks([(lost, ()), (neighbour, ()), (sequence(""), ())])
    assert rows[0] is not None and not rows[0].any()
    assert rows[1] is not None and rows[1].any()
    assert rows[2] is None


@pytest.mark.parametrize(
    ("form", "value", "part"),
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', ""),
        ("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(4)]}
                                              for i in range(8)]}), "large"),
        ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', ""),
        ("regex", "a{1000000}", "too many"),  # it explodes after its first token
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-ahead"),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", "begin: /a/", "start"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(grammars: Grammars, form: str, value: str, part: str) -> None:
    answer = check({"form": form, "value": value, "outputs": []}, grammars.warm())
    assert part in answer["error"] and "<state>" not in answer["error"]


def test_resumed_tokens_must_follow(grammars: Grammars, tokenizer: Tokenizer) -> None:
    asked = {"form": "choice", "value": ["yes", "no"], "outputs": [tokenizer.encode("ye")]}
    assert "grammar" in check(asked, grammars.warm())
    asked["outputs"] = [[], [*tokenizer.encode("yes"), EOS], tokenizer.encode("on")]
    assert check(asked, grammars.warm()) == {"output": 2}


TEMPLATES = {
    ToolFormat.HERMES: "{{ tools }} <tool_call>",
    ToolFormat.LLAMA3: '{{ tools }} {"name": f, "parameters": p}',
    ToolFormat.MISTRAL: "{{ tools }} [TOOL_CALLS]",
}


@pytest.mark.parametrize("special", [True, False], ids=["marked by a token", "marked by text"])
@pytest.mark.parametrize("kind", list(ToolFormat))
def test_a_required_call_can_be_read_and_follows_its_schema(
    checkpoint: Path, tmp_path: Path, kind: ToolFormat, special: bool
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    if special:
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.add_special_tokens(["[TOOL_CALLS]"])
        backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    grammars = Grammars(lambda: load_vocabulary(tmp_path))
    model: Any = SimpleNamespace(tokenizer=tokenizer, chat_template=ChatTemplate(TEMPLATES[kind]))
    schema = {
        "type": "object", "properties": {"x": {"enum": ["a\"}{", "b"]}, "n": {"type": "integer"}},
        "required": ["x"], "additionalProperties": False,
    }  # fmt: skip
    add = generation_pb2.Tool(name="add", parameters=json.dumps(schema))
    chat = generation_pb2.ChatRequest(tools=[add, generation_pb2.Tool(name="stop")])
    chat.tool_choice.name = "add"
    for seed in range(3):
        answer = check(
            {"form": "grammar", "value": grammar_of_calls(chat, model), "outputs": []}, grammars.warm()
        )
        text = walk(grammars, tokenizer, answer["grammar"], random.Random(seed), most=30)
        reader = AssistantText(kind, reasoning=False)
        parts = [*map(reader.add, text), reader.finish()]
        calls = [delta for part in parts for delta in part.calls]
        assert "".join(part.content for part in parts) == ""
        names = [delta.name for delta in calls if delta.name]
        assert set(names) == {"add"} and (len(names) == 1 or kind is ToolFormat.MISTRAL)
        for index in range(len(names)):
            arguments = "".join(delta.arguments for delta in calls if delta.index == index)
            jsonschema.validate(json.loads(arguments), schema)
