"""What structured output costs: compiling, a mask a token, a step of a full batch; which schemas it takes.

    python -m benchmarks.structured [--model smollm2] [--batch 32]

Where xgrammar can be imported, it is measured beside llguidance, which the server uses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import torch

from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.quality import runner_of
from salver.model.tokenizer import Tokenizer
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.grammar import Grammars, compile_grammar, load_vocabulary
from salver.server.engine.host_memory import keep_freed_memory
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
from salver.server.grammar_check import grammar_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "country": {"enum": ["de", "fr", "it"]}},
            "required": ["street", "country"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
TEXT = json.dumps(
    {
        "name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry \"and\" more", "engines"],
        "address": {"street": "12 Saint James's Square", "country": "fr"},
    }
)  # fmt: skip
# One schema for each thing that JSON Schema can say, a valid and an invalid text for it.
FEATURES: dict[str, tuple[Any, str, str]] = {
    "enum of mixed types": ({"enum": ["a", 1, None]}, "1", "2"),
    "const object": ({"const": {"a": [1]}}, '{"a": [1]}', '{"a": [2]}'),
    "integer bounds": ({"type": "integer", "minimum": -5, "maximum": 300}, "-5", "301"),
    "number bounds": ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 7}, "0.75", "0.5"),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, "21", "22"),
    "string length": ({"type": "string", "minLength": 2, "maxLength": 3}, '"ab"', '"abcd"'),
    "pattern": ({"type": "string", "pattern": "^[a-c]+$"}, '"abc"', '"abd"'),
    "format date-time": (
        {"type": "string", "format": "date-time"}, '"2026-01-02T03:04:05Z"', '"2026-13-02T03:04:05Z"',
    ),
    "format email": ({"type": "string", "format": "email"}, '"a@b.de"', '"a"'),
    "format uuid": (
        {"type": "string", "format": "uuid"}, '"123e4567-e89b-12d3-a456-426614174000"', '"123e4567"',
    ),
    "items and prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
        '[1, "a"]', '["a"]',
    ),
    "minItems and maxItems": (
        {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, "[null]", "[]",
    ),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "[1, 2]", "[1, 1]"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[1]", "[2]"),
    "required": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a": 1}', "{}",
    ),
    "additionalProperties": (
        {"type": "object", "additionalProperties": {"type": "integer"}}, '{"x": 1}', '{"x": "y"}',
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
        '{"ab": 1}', '{"b": 1}',
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a$"}}, '{"a": 1}', '{"b": 1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a": 1}', "{}"),
    "dependentRequired": (
        {"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1, "b": 2}', '{"a": 1}',
    ),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", '"a"'),
    "oneOf, disjoint": (
        {"oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "integer"}},
             "required": ["k", "x"]},
            {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]},
        ]},
        '{"k": "a", "x": 1}', '{"k": "a"}',
    ),
    "oneOf, overlapping": ({"oneOf": [{"type": "integer"}, {"minimum": 5}]}, "3", "6"),
    "allOf": (
        {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                   {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
        '{"a": 1, "b": null}', '{"a": 1}',
    ),
    "not": ({"type": "integer", "not": {"const": 3}}, "4", "3"),
    "if, then": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
         "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        '{"a": 1, "b": 2}', '{"a": 1}',
    ),
    "$ref, recursive": (
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}},
                                              "additionalProperties": False}}},
        '{"n": {"n": {}}}', '{"n": 1}',
    ),
}  # fmt: skip


def once(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


class OfLlguidance:
    name = "llguidance"

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        self.vocabulary = load_vocabulary(checkpoint)

    def compile(self, schema: Any) -> Any:
        """Raises ValueError for what it does not take."""
        matcher = compile_grammar(grammar_of("json_schema", json.dumps(schema)), self.vocabulary)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def walk(self, matcher: Any, token_ids: Iterable[int]) -> tuple[bool, list[float]]:
        """Whether it allows the tokens and then the end; seconds of each mask."""
        seconds = []
        for token_id in token_ids:
            seconds.append(once(matcher.compute_bitmask))
            if not matcher.consume_token(token_id):
                return False, seconds
        return bool(matcher.is_accepting()), seconds


class OfXgrammar:
    name = "xgrammar"

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        import xgrammar

        self._library = xgrammar
        tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        info = xgrammar.TokenizerInfo(
            tokens, vocab_size=len(tokens), stop_token_ids=list(tokenizer.eos_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._bitmask = xgrammar.allocate_token_bitmask(1, len(tokens))

    def compile(self, schema: Any) -> Any:
        try:
            compiled = self._compiler.compile_json_schema(json.dumps(schema))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return self._library.GrammarMatcher(compiled)

    def walk(self, matcher: Any, token_ids: Iterable[int]) -> tuple[bool, list[float]]:
        seconds = []
        for token_id in token_ids:
            seconds.append(once(lambda: matcher.fill_next_token_bitmask(self._bitmask)))
            if not matcher.accept_token(token_id):
                return False, seconds
        return bool(matcher.is_completed()), seconds


def cost(library: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    compiling = [once(lambda: library.compile(PERSON)) for _ in range(5)]
    ok, cold = library.walk(library.compile(PERSON), ids)
    assert ok
    warm = [s for _ in range(5) for s in library.walk(library.compile(PERSON), ids)[1]]
    row(
        library.name,
        f"{1e3 * statistics.median(compiling):.1f}",
        f"{1e6 * statistics.median(warm):.0f}",
        f"{1e6 * statistics.fmean(warm):.0f}",
        f"{1e6 * max(cold):.0f}",
    )


def coverage(library: Any, tokenizer: Tokenizer) -> dict[str, str]:
    found = {}
    for name, (schema, good, bad) in FEATURES.items():
        try:
            verdicts = [
                library.walk(library.compile(schema), tokenizer.encode(text, add_special_tokens=False))[0]
                for text in (good, bad)
            ]
        except ValueError:
            found[name] = "refused"
            continue
        found[name] = {(True, False): "yes", (True, True): "ignored", (False, False): "too strict"}.get(
            (verdicts[0], verdicts[1]), "wrong"
        )
    return found


def core_of(checkpoint: Path, batch: int, grammar: str) -> EngineCore:
    """An engine in which `batch` sequences decode, warm, as in a worker."""
    runner = runner_of(checkpoint, "bfloat16", torch.get_num_threads(), batch * 16 + 1)
    runner.grammars = Grammars(lambda: load_vocabulary(checkpoint), beside=False)
    runner.grammars.warm()
    limits = EngineLimits(
        num_blocks=batch * 16 + 1, block_size=16, max_model_len=256, max_num_seqs=batch,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    core = EngineCore(runner, limits, clock=time.monotonic)
    for number in range(batch):
        item = EngineRequest(
            number, tuple(range(100 + number, 132 + number)), SamplingParams(temperature=0.8, seed=number),
            StoppingParams(200),
        )  # fmt: skip
        core.add(replace(item, grammar=grammar))
    keep_freed_memory()
    for _ in range(4):
        core.step()
    return core


def step_times(checkpoint: Path, batch: int, grammars: Sequence[str], num_steps: int = 60) -> list[float]:
    """Median seconds of a full batch's step under each grammar; in turns, so that noise meets all."""
    cores = [core_of(checkpoint, batch, grammar) for grammar in grammars]
    seconds: list[list[float]] = [[] for _ in grammars]
    for _ in range(num_steps):
        for core, taken in zip(cores, seconds, strict=True):
            taken.append(once(core.step))
    return [statistics.median(taken) for taken in seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    checkpoint = checkpoint_of(options.model, "bfloat16", options.cache_dir)
    tokenizer = Tokenizer.from_directory(checkpoint)
    libraries: list[Any] = [OfLlguidance(checkpoint, tokenizer)]
    try:
        libraries.append(OfXgrammar(checkpoint, tokenizer))
    except ImportError:
        pass
    row("library", "compile, ms", "a mask, us (median)", "(mean)", "slowest when new")
    row(*["---"] * 5)
    for library in libraries:
        cost(library, tokenizer)
    print()
    row("JSON Schema", *(library.name for library in libraries))
    row(*["---"] * (1 + len(libraries)))
    found = [coverage(library, tokenizer) for library in libraries]
    for name in FEATURES:
        row(name, *(of[name] for of in found))
    print()
    forms = {"json_schema": json.dumps(PERSON), "regex": "([a-z]+ )*"}
    grammars = [grammar_of(form, value) for form, value in forms.items()]
    free, *bound = step_times(checkpoint, options.batch, ["", *grammars])
    for form, seconds in zip(forms, bound, strict=True):
        print(
            f"step of {options.batch}: {1e3 * free:.1f} ms free, {1e3 * seconds:.1f} ms with {form} "
            f"({100 * (seconds / free - 1):+.1f}%)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
