"""Prompts, conversations and score inputs become token ids. Long texts off the event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from google.protobuf import json_format, struct_pb2

from salver.model.chat_template import ChatTemplate, ChatTemplateError
from salver.model.tokenizer import Tokenizer
from salver.server.engine.request import SamplingParams
from salver.server.rpc.errors import Violation, invalid_argument, task_not_supported
from salver.server.rpc.served import ServedModel
from salver.server.rpc.tools import for_template, turn_of
from salver.v1 import common_pb2, generation_pb2

# Above this many characters a tokenization takes longer (about a millisecond) than a loop should wait.
LONG_TEXT = 4096
_ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
    generation_pb2.ROLE_TOOL: "tool",
}
_RESERVED = ("tools", "messages", "add_generation_prompt", "continue_final_message")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ScorePrompt:
    """What is computed for one score input: all ids, and where the continuation starts in them."""

    token_ids: tuple[int, ...]
    start: int
    source_ids: tuple[int, ...] = ()  # of an encoder-decoder: the context


class PromptReader:
    """Tokenizes; owns the small thread pool for long texts (the tokenizers library frees the GIL)."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    async def run(self, size: int, work: Callable[[], _T]) -> _T:
        """`work()`, in the pool when it is about more than LONG_TEXT characters."""
        if size <= LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prompt(self, prompt: common_pb2.Prompt, model: ServedModel) -> tuple[int, ...]:
        """Ids of a prompt that was checked. Raises ApiError when its text tokenizes to nothing."""
        if prompt.WhichOneof("prompt") == "token_ids":
            return tuple(prompt.token_ids.ids)
        ids = await self.run(len(prompt.text), lambda: model.tokenizer.encode(prompt.text))
        if not ids:
            raise invalid_argument([Violation("prompt.text", "tokenizes to nothing")])
        return tuple(ids)

    async def conversation(
        self,
        messages: Sequence[generation_pb2.Message],
        model: ServedModel,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        template_kwargs: struct_pb2.Struct | None = None,
        tools: Sequence[generation_pb2.Tool] = (),
    ) -> tuple[str, tuple[int, ...]]:
        """A conversation as the chat template writes it, and its ids. Raises ApiError."""

        def work() -> tuple[str, list[int]]:
            text = render(
                messages, model, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, template_kwargs=template_kwargs, tools=tools,
            )  # fmt: skip
            # Templates write the special tokens themselves.
            return text, model.tokenizer.encode(text, add_special_tokens=False)

        size = sum(len(message.content) for message in messages) + sum(len(tool.parameters) for tool in tools)
        text, ids = await self.run(size, work)
        if not ids:
            raise invalid_argument([Violation("messages", "the conversation tokenizes to nothing")])
        return text, tuple(ids)

    async def words(self, texts: Sequence[str], model: ServedModel) -> tuple[tuple[int, ...], ...]:
        """Token sequences of words, each as it is and after a space; those of no token are left out.

        So transformers and vLLM take bad words.
        """

        def work() -> tuple[tuple[int, ...], ...]:
            found: dict[tuple[int, ...], None] = {}
            for text in texts:
                for spelled in (text, " " + text.lstrip(" ")):
                    found[tuple(model.tokenizer.encode_output(spelled))] = None
            return tuple(ids for ids in found if ids)

        return await self.run(sum(map(len, texts)), work) if texts else ()

    async def with_words(
        self, said: common_pb2.SamplingParams, sampling: SamplingParams, model: ServedModel
    ) -> SamplingParams:
        """The parameters with the words that were said as tokens.

        Raises ApiError where allowed words have none.
        """
        if not (said.bad_words or said.allowed_words):
            return sampling
        bad = await self.words(said.bad_words, model)
        allowed = await self.words(said.allowed_words, model)
        if said.allowed_words and not allowed:
            raise invalid_argument([Violation("sampling.allowed_words", "tokenize to nothing")])
        return replace(sampling, bad_words=(*sampling.bad_words, *bad), allowed_words=allowed)

    async def score(
        self, inputs: Sequence[generation_pb2.ScoreInput], model: ServedModel
    ) -> list[ScorePrompt]:
        """Ids of score inputs that were checked. Raises ApiError where a continuation has no tokens."""
        size = sum(len(item.context.text) + len(item.continuation.text) for item in inputs)
        work = functools.partial(_score_prompts, inputs, model.tokenizer)
        if model.source is not None:
            work = functools.partial(_score_sides, inputs, model.tokenizer)
        return await self.run(size, work)


def template_of(model: ServedModel) -> ChatTemplate:
    """The chat template. Raises ApiError (FAILED_PRECONDITION) for a checkpoint without one."""
    if model.chat_template is None:
        raise task_not_supported(f"{model.name!r} has no chat template: use Generate")
    return model.chat_template


def render(
    messages: Sequence[generation_pb2.Message],
    model: ServedModel,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    template_kwargs: struct_pb2.Struct | None = None,
    tools: Sequence[generation_pb2.Tool] = (),
) -> str:
    """The text of a conversation. Raises ApiError when the template refuses it."""
    template = template_of(model)
    kwargs: dict[str, Any] = {} if template_kwargs is None else json_format.MessageToDict(template_kwargs)
    reserved = [name for name in _RESERVED if name in kwargs]
    if reserved:
        raise invalid_argument(
            [Violation(f"template_kwargs.{name}", "is a field of the request") for name in reserved]
        )
    turns = [turn_of(message, _ROLES[message.role]) for message in messages]
    try:
        return template.render(
            turns, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, tools=for_template(tools), **kwargs,
        )  # fmt: skip
    except ChatTemplateError as error:
        raise invalid_argument([Violation("messages", str(error))]) from error


def _score_prompts(inputs: Sequence[generation_pb2.ScoreInput], tokenizer: Tokenizer) -> list[ScorePrompt]:
    prompts: list[ScorePrompt] = []
    violations: list[Violation] = []
    for position, item in enumerate(inputs):
        prompt = _score_prompt(item, tokenizer)
        if prompt.start >= len(prompt.token_ids):
            violations.append(Violation(f"inputs[{position}].continuation", "tokenizes to nothing"))
        prompts.append(prompt)
    if violations:
        raise invalid_argument(violations)
    return prompts


def _score_sides(inputs: Sequence[generation_pb2.ScoreInput], tokenizer: Tokenizer) -> list[ScorePrompt]:
    """Of an encoder-decoder: context and continuation apart, each by the tokenizer of its side."""

    def ids(prompt: common_pb2.Prompt, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
        return tuple(prompt.token_ids.ids or (encode(prompt.text) if prompt.text else ()))

    return [
        ScorePrompt(ids(item.continuation, tokenizer.encode_output), 0, ids(item.context, tokenizer.encode))
        for item in inputs
    ]


def _score_prompt(item: generation_pb2.ScoreInput, tokenizer: Tokenizer) -> ScorePrompt:
    context, continuation = item.context, item.continuation
    context_is_text = context.WhichOneof("prompt") != "token_ids"
    if continuation.WhichOneof("prompt") == "text" and context_is_text:
        # As one string; a token across the boundary belongs to the continuation.
        boundary = len(context.text)
        spans = tokenizer.encode_with_offsets(context.text + continuation.text)
        ids = [token_id for token_id, _, _ in spans]
        start = next((i for i, (_, _, end) in enumerate(spans) if end > boundary), len(ids))
    else:
        if context_is_text:
            ids = tokenizer.encode(context.text) if context.text else []
        else:
            ids = list(context.token_ids.ids)
        start = len(ids)
        if continuation.WhichOneof("prompt") == "text":
            ids += tokenizer.encode(continuation.text, add_special_tokens=False)
        else:
            ids += continuation.token_ids.ids
    bos = tokenizer.bos_token_id
    if start == 0 and bos is not None and ids and ids[0] != bos:
        return ScorePrompt((bos, *ids), 1)
    return ScorePrompt(tuple(ids), start)
