"""The checkpoint's own chat template, rendered as transformers' apply_chat_template renders it.

A template is a program that came with the checkpoint. It runs in Jinja's sandbox on plain
data, and its output, its loop iterations and its time are bounded.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.parser import Parser

from .errors import CheckpointError
from .tokenizer.tokenizer import read_json, token_text

MAX_ITERATIONS = 1_000_000
MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 26

_TICK = "salver_loop_tick"
_CONTINUE_TAG = (
    "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own; its last space tells whether text is trimmed
)
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(Exception):
    """The template refused or failed on these messages, or is itself broken; the message says which."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name.

    `tokens`: variables such as bos_token, given to the template as they are.
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None) -> None:
        self.source = source
        self._tokens = dict(tokens or {})
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["dict"] = _TemplateDict()
        environment.globals["namespace"] = _TemplateNamespace
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ChatTemplateError(f"the checkpoint's chat template is broken{line}: {error}") from error

    @classmethod
    def from_directory(cls, path: Path) -> ChatTemplate | None:
        """The template in `chat_template.jinja`, else in tokenizer_config.json; None without one.

        Raises CheckpointError for a file that cannot be read, ChatTemplateError for one that is broken.
        """
        settings = read_json(path / "tokenizer_config.json")
        special = {**read_json(path / "special_tokens_map.json"), **settings}
        source: object = settings.get("chat_template")
        file = path / "chat_template.jinja"
        try:
            if file.is_file():
                source = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{path / 'tokenizer_config.json'}: chat_template is not a text")
        tokens = {name: token_text(special.get(name)) for name in _TOKEN_NAMES}
        return cls(source, {name: text for name, text in tokens.items() if text is not None})

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages` (role, content and perhaps name each); `kwargs` are template variables.

        With `continue_final_message` the text ends inside the last message, for the model to carry on,
        and no header of a new turn follows. `kwargs` are JSON-like values: None, bool, int, float, str,
        lists and dicts. Raises ChatTemplateError.
        """
        if not messages:
            raise ChatTemplateError("a conversation needs at least one message")
        conversation = [dict(message) for message in messages]
        if continue_final_message:
            add_generation_prompt = False
            conversation[-1]["content"] = conversation[-1].get("content", "") + _CONTINUE_TAG
        budget = _Budget()
        variables = {"tools": None, "documents": None, **self._tokens, **kwargs, _TICK: budget.tick}
        variables |= {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        try:
            for piece in self._template.generate(variables):
                budget.write(len(piece))
                pieces.append(piece)
        except _RunawayError as error:
            raise ChatTemplateError(f"the checkpoint's chat template {error}") from error
        except jinja2.TemplateError as error:
            # Exactly that class is what raise_exception raises; the others are faults of the template.
            verb = "refused the messages" if type(error) is jinja2.TemplateError else "failed"
            raise ChatTemplateError(f"the checkpoint's chat template {verb}: {error}") from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise ChatTemplateError(
                f"the checkpoint's chat template failed: {type(error).__name__}: {error}"
            ) from error
        text = "".join(pieces)
        return _cut_at_tag(text, messages[-1].get("content", "")) if continue_final_message else text


def _cut_at_tag(text: str, final_message: str) -> str:
    """`text` up to the tag that marks the end of the final message, as transformers cuts it."""
    tag = _CONTINUE_TAG.strip()
    if final_message.strip() not in text or tag not in text:
        raise ChatTemplateError(
            "continue_final_message: the checkpoint's chat template does not write the final message as it is"
        )
    at = text.rindex(tag)
    kept = text[:at]
    return kept if text[at:].startswith(_CONTINUE_TAG) else kept.rstrip()


class _RunawayError(Exception):
    """Beyond a bound."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._iterations = 0
        self._characters = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> str:
        """Called at every loop iteration."""
        self._iterations += 1
        if self._iterations > MAX_ITERATIONS:
            raise _RunawayError(f"ran for more than {MAX_ITERATIONS} loop iterations")
        if self._iterations % 64 == 0 and time.monotonic() > self._deadline:
            raise _RunawayError(f"ran for more than {MAX_SECONDS:g} s")
        return ""

    def write(self, characters: int) -> None:
        self._characters += characters
        if self._characters > MAX_CHARACTERS:
            raise _RunawayError(f"wrote more than {MAX_CHARACTERS} characters")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with every loop counted and no operator that makes much from little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse the repetitions and powers whose result could be enormous."""
        if operator == "**" and not (abs(left) < 1 << 64 and abs(right) < 64):
            raise _RunawayError("computed too large a power")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if (
                    isinstance(text, str | list | tuple)
                    and isinstance(times, int)
                    and len(text) * times > MAX_CHARACTERS
                ):
                    raise _RunawayError("repeated a text too often")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(jinja2.nodes.For):
            tick = jinja2.nodes.Call(jinja2.nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - an attribute of jinja's

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateDict:
    """`dict` for templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` for templates, without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute cannot be called {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML characters.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
