"""Rendered chats equal those of transformers' apply_chat_template; broken and runaway templates end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.small_tokenizers import byte_level

from salver.model.chat_template import ChatTemplate, ChatTemplateError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """\
{%- set ns = namespace(system='none', count=0) %}
{%- macro shout(text) %}{% for letter in text %}{{ letter | upper }}{% endfor %}{% endmacro %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% set ns.system = message.content %}
        {% continue %}
    {% endif %}
    {% if ns.count == 3 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
<{{ message.role }} {{ message.name | default('nobody') }}>
    {% generation %}{{ shout(message.content) }}{% endgeneration %}

{% endfor %}
{{ {'a': '<é>', 'system': ns.system, 'date': strftime_now('%')} | tojson(indent=1) }}
{{ 'x' * 3 }}{{ 2 ** 10 }}{{ '%s' % 'y' }}{{ undefined_name }}{{ tools }}{{ flavour }}
"""
TEMPLATES = {"smollm2": SMOLLM2, "llama2": LLAMA2, "blocks": BLOCKS}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " Hello? "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
    [
        {"role": "user", "content": "a<b>"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "ü"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x", "name": "Ann"}],
]


@pytest.fixture(scope="module")
def reference() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("mode", ["prompt", "no_prompt", "continue"])
def test_equals_transformers(reference: Any, name: str, chat: list[dict[str, str]], mode: str) -> None:
    options = {"add_generation_prompt": mode == "prompt", "continue_final_message": mode == "continue"}
    ours = ChatTemplate(TEMPLATES[name], TOKENS)
    try:
        expected = reference.apply_chat_template(
            chat, chat_template=TEMPLATES[name], tokenize=False, flavour=["mild", None, 1.5], **options
        )
    except Exception as error:
        # Continuing "blocks" is refused by both: it changes the message's text.
        refusal = "Roles must alternate" if name == "llama2" else "continue_final_message"
        assert refusal in str(error)
        with pytest.raises(ChatTemplateError, match=refusal):
            ours.render(chat, flavour=["mild", None, 1.5], **options)
        return
    assert ours.render(chat, flavour=["mild", None, 1.5], **options) == expected


def test_continuing_the_final_message() -> None:
    template = ChatTemplate(SMOLLM2)
    chat = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}]
    text = template.render(chat, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nOne, two,")
    assert chat[-1]["content"] == "One, two,"  # the caller's messages stay as they were
    with pytest.raises(ChatTemplateError, match="does not write the final message"):
        ChatTemplate("{{ messages[0].content }}").render(chat, continue_final_message=True)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}A"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None and found.render([{"role": "user", "content": ""}]) == "<s>A"
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None and found.source == "C"
    (tmp_path / "chat_template.jinja").write_text("D")
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None and found.source == "D"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for x in %}", "is broken in line 2"),
        ("{{ messages[0].missing.deeper }}", "failed"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(_x=1) }}", "_x"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "ran for more than",
        ),
        ("{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "wrote more than"),
        ("{{ 'x' * 10 ** 9 }}", "repeated"),
        ("{{ 9 ** 99 }}", "power"),
        ("{{ range(10 ** 9) | length }}", "failed"),
    ],
)
def test_failures_and_runaways(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_an_empty_conversation() -> None:
    with pytest.raises(ChatTemplateError, match="at least one message"):
        ChatTemplate(SMOLLM2).render([])
