"""Structured output over a real port: what is compiled, refused and left alone."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_tokenizer
from support.fake_service import Code, failure, fields_of, request, run, service, until

from salver.server.rpc import grammar
from salver.v1 import (
    generation_pb2,
)


def structured(kind: Any = generation_pb2.GenerateRequest, stopping: Any = None, **form: Any) -> Any:
    asked = request("abc", kind, **(stopping or {}))
    asked.structured_output.CopyFrom(generation_pb2.StructuredOutput(**form))
    return asked


def test_structured_output_reaches_the_engine_compiled(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, None)

    async def test() -> None:
        async with service(checkpoint=tmp_path) as served:
            generate = served.generation.Generate
            for _ in range(2):
                await generate(structured(regex="[a-z]+"))
            grammars = [item.grammar for item in served.engine.requests]
            assert grammars[0] == grammars[1] != ""
            code, details = await failure(generate(structured(regex="(a")))
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, ["structured_output.regex"])
            code, details = await failure(
                generate(structured(json_object=False, stopping={"stop": ["x"], "ignore_eos": True}))
            )
            assert code is Code.INVALID_ARGUMENT
            assert fields_of(details) == [
                "structured_output.json_object", "stopping.stop", "stopping.ignore_eos",
            ]  # fmt: skip
            none = structured()
            assert fields_of((await failure(generate(none)))[1]) == ["structured_output"]
            resumed = structured(regex="[a-z]+")
            resumed.resume.samples.add(index=0, token_ids=[5])
            resumed.resume.numerics_id = "numerics-1"
            code, details = await failure(generate(resumed))
            assert (code, fields_of(details)) == (Code.INVALID_ARGUMENT, ["resume.samples"])

    run(test)


SLOW = (
    "import sys; print('ready', flush=True)\nfor line in sys.stdin:\n"
    " open(sys.argv[1] + '/asked', 'a').write('x'); __import__('time').sleep(0.3)\n"
    ' print(\'{"grammar": "g"}\', flush=True)'
)


def test_a_caller_that_leaves_takes_the_process_from_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grammar, "COMMAND", (sys.executable, "-c", SLOW))

    async def test() -> None:
        async with service(checkpoint=tmp_path) as served:
            generate = served.generation.Generate
            left = generate(structured(regex="a"))
            await until((tmp_path / "asked").exists)
            left.cancel()
            await generate(structured(regex="b"))
            await generate(structured(regex="a"))
            assert (tmp_path / "asked").read_text() == "xx", "the answer for the first one was kept"

    run(test)


STUCK = "import sys,time; print('ready', flush=True); [time.sleep(60) for line in sys.stdin]"
GREEDY = "import sys,os; print('ready', flush=True); sys.stdin.readline(); os._exit(1)"


@pytest.mark.parametrize(("program", "part"), [(STUCK, "0.2 s"), (GREEDY, "memory")])
def test_a_grammar_that_explodes_is_refused_and_nothing_else_notices(
    program: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(grammar, "COMMAND", (sys.executable, "-c", program))
    starts = []
    start = asyncio.create_subprocess_exec

    async def counted(*command: Any, **options: Any) -> Any:
        starts.append(await start(*command, **options))
        return starts[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", counted)

    async def test() -> None:
        async with service(checkpoint=tmp_path) as served:
            generate = served.generation.Generate
            neighbour = asyncio.ensure_future(generate(request(max_tokens=6)))
            for _ in range(2):
                code, details = await failure(generate(structured(regex="a")))
                assert code is Code.INVALID_ARGUMENT
                assert part in details["BadRequest"].field_violations[0].description
            assert (await neighbour).completions[0].text == "hello,"
            assert len(starts) == 1, "what was refused once is known"
            await until(lambda: starts[0].returncode is not None)
            monkeypatch.setattr(grammar, "FAILURE_SECONDS", -1.0)
            for number in range(2, 4):
                await failure(generate(structured(regex="b")))
                assert len(starts) == number, "but for some time only"

    run(test)
