"""Structured output on the front's side: what a request asks for, tried in a process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from salver.server.rpc.errors import Violation, invalid_argument, task_not_supported
from salver.server.rpc.served import ServedModel
from salver.v1 import generation_pb2

COMMAND = (sys.executable, "-m", "salver.server.grammar_check")
COMPILE_SECONDS = 2.0
START_SECONDS = 60.0
FAILURE_SECONDS = 60.0
CACHED = 256
MAX_BYTES = 1 << 18
MAX_CHOICES = 1024
_LINE_LIMIT = 1 << 24
# What would end a text, or change it, before it is whole.
_CONTRADICTING = ("stop", "stop_token_ids", "ignore_eos", "include_stop")
_Answer = dict[str, Any]


def check_followable(request: Any, model: ServedModel) -> list[Violation]:
    """What is wrong with a request whose output must follow a grammar, whichever.

    Raises ApiError (FAILED_PRECONDITION) where the checkpoint's tokens cannot follow one.
    """
    if not model.tokenizer.eos_token_ids:
        raise task_not_supported(f"{model.name!r} has no end-of-sequence token for structured output")
    if model.tokenizer.decoding is None:
        raise task_not_supported(f"the tokens of {model.name!r} have no bytes for a grammar to follow")
    return [
        Violation(f"stopping.{name}", "cannot be set where the form of the output is")
        for name in _CONTRADICTING
        if getattr(request.stopping, name)
    ]


def check_structured_output(request: Any) -> list[Violation]:
    """What is wrong with `structured_output`, but for the grammar itself."""
    form, value = _form_of(request.structured_output)
    field = f"structured_output.{form}" if form else "structured_output"
    found = []
    if not form:
        found.append(Violation(field, "must say a form"))
    elif not value:
        found.append(
            Violation(field, "must not be empty" if form != "json_object" else "must be true or unset")
        )
    elif form == "choice":
        if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_BYTES:
            found.append(
                Violation(field, f"must be at most {MAX_CHOICES} options of {MAX_BYTES} characters together")
            )
        if "" in value:
            found.append(Violation(f"{field}.options[{value.index('')}]", "must not be empty"))
    elif form != "json_object" and len(value) > MAX_BYTES:
        found.append(Violation(field, f"must be at most {MAX_BYTES} characters"))
    return found


def _form_of(proto: generation_pb2.StructuredOutput) -> tuple[str, Any]:
    form = proto.WhichOneof("form")
    if form is None:
        return "", None
    value = getattr(proto, form)
    return form, list(value.options) if form == "choice" else value


class GrammarCompiler:
    """Owns the process; one grammar at a time, answers remembered."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._known: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._asking: set[asyncio.Task[_Answer]] = set()
        self._closed = False

    async def compile(
        self,
        proto: generation_pb2.StructuredOutput,
        model: ServedModel,
        outputs: Sequence[Sequence[int]],
        *,
        outputs_field: str = "resume.samples",
    ) -> str:
        """The grammar for the engine. `outputs` are tokens so far, which must follow it. Raises ApiError."""
        form, value = _form_of(proto)
        field = f"structured_output.{form}"
        return await self.compile_form(form, value, field, model, outputs, outputs_field=outputs_field)

    async def compile_form(
        self,
        form: str,
        value: Any,
        field: str,
        model: ServedModel,
        outputs: Sequence[Sequence[int]],
        *,
        outputs_field: str = "resume.samples",
    ) -> str:
        """The same, of a form of StructuredOutput; what is wrong with it is wrong with `field`."""
        key = (form, json.dumps(value))
        outputs = [list(ids) for ids in outputs if ids]
        answer = None if outputs else self._remembered(key)
        if answer is None:
            question = {"form": form, "value": value, "outputs": outputs}
            # A caller that leaves takes the process away from nobody.
            asking = asyncio.create_task(self._ask_once(key, question, model.checkpoint))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            answer = await asyncio.shield(asking)
        if "output" in answer:
            raise invalid_argument([Violation(outputs_field, f"do not follow {field.partition('.')[0]}")])
        if "error" in answer:
            raise invalid_argument([Violation(field, answer["error"])])
        return str(answer["grammar"])

    def _remembered(self, key: tuple[str, str]) -> _Answer | None:
        answer = self._known.get(key)
        if answer is None or answer.get("until", math.inf) < time.monotonic():
            return None
        self._known.move_to_end(key)
        return answer

    async def _ask_once(self, key: tuple[str, str], question: _Answer, checkpoint: str) -> _Answer:
        """The answer, when its turn comes: perhaps another has asked the same meanwhile."""
        async with self._lock:
            answer = None if question["outputs"] else self._remembered(key)
            if answer is None:
                answer = await self._ask(question, checkpoint)
                if "output" not in answer:
                    self._known[key] = answer
                    if len(self._known) > CACHED:
                        self._known.popitem(last=False)
            return answer

    async def _ask(self, question: _Answer, checkpoint: str) -> _Answer:
        process = await self._started(checkpoint)
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                process.stdin.write(json.dumps(question).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            await self._end()
            return _failed(f"takes more than {COMPILE_SECONDS:g} s to compile")
        except (ConnectionError, ValueError):
            line = b""
        if not line:
            await self._end()
            return _failed("takes too much memory to compile")
        answer: _Answer = json.loads(line)
        return answer

    async def _started(self, checkpoint: str) -> Process:
        """The running process, started if need be."""
        if self._closed:
            raise RuntimeError("the server is closing")
        if self._process is not None and self._process.returncode is None:
            return self._process
        process = self._process = await asyncio.create_subprocess_exec(
            *COMMAND, checkpoint, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=_LINE_LIMIT
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                hello = await process.stdout.readline()
        except BaseException:
            await self._end()
            raise
        if not hello:
            await self._end()
            raise RuntimeError("the process that compiles grammars does not start")
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def close(self) -> None:
        """Ends the process, and whoever waits for it."""
        self._closed = True
        for asking in self._asking:
            asking.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        await self._end()


def _failed(error: str) -> _Answer:
    """Of a process that had to end. The machine may be to blame, so it is not believed for ever."""
    return {"error": error, "until": time.monotonic() + FAILURE_SECONDS}
