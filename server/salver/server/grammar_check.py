"""The process that compiles what a request says its output must be, so that it can be killed.

`python -m salver.server.grammar_check CHECKPOINT` reads a line of JSON for each grammar and answers
with one; it ends when its input does. What it compiles is bounded in time by who waits for the
answer and in memory here.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from salver.server.engine.grammar import compile_grammar, load_vocabulary

MEMORY = 1 << 30  # bytes beyond what the vocabulary takes
TOKENS_AHEAD = 4  # are tried of an output
READY = "ready"
# One line break and some blanks where JSON may have any number, or a model can go on with them for ever.
_WHITESPACE = r"\n?[ \t]{0,32}"


def grammar_of(form: str, value: Any) -> str:
    """The grammar of one field of StructuredOutput, as llguidance takes it. Raises ValueError."""
    match form:
        case "json_schema" | "json_object":
            schema = value if form == "json_schema" else '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(value)
        case "grammar":
            return LLMatcher.grammar_from_lark(value)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
    raise ValueError(f"no such form: {form}")


def check(request: dict[str, Any], vocabulary: LLTokenizer) -> dict[str, Any]:
    """{"grammar"}, or {"error"}: what is wrong; {"output"}: which of the resumed ones does not follow it."""
    try:
        grammar = grammar_of(request["form"], request["value"])
    except ValueError as error:
        return {"error": str(error)}
    matcher = compile_grammar(grammar, vocabulary)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        return {"error": _reason(matcher)}
    if not any(mask):
        return {"error": "no text follows it"}
    if (reason := _fails_soon(matcher.deep_copy(), mask)) is not None:
        return {"error": reason}
    for index, token_ids in enumerate(request["outputs"]):
        if matcher.validate_tokens(token_ids) < len(token_ids):
            return {"output": index}
    return {"grammar": grammar}


def _fails_soon(matcher: LLMatcher, mask: bytes) -> str | None:
    """Why it is too much for the limits a few tokens on: what is only counted then may explode."""
    for _ in range(TOKENS_AHEAD):
        allowed = (8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1)
        matcher.consume_token(next(allowed))
        if matcher.is_stopped() and not matcher.is_error():
            return None
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return _reason(matcher)
        if not any(mask):
            return None
    return None


def _reason(matcher: LLMatcher) -> str:
    """What the library says is wrong, without its own state."""
    return str(matcher.get_error()).partition("\n<state>")[0]


def main(checkpoint: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides
    vocabulary = load_vocabulary(Path(checkpoint))
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(READY), flush=True)
    for line in sys.stdin:
        print(json.dumps(check(json.loads(line), vocabulary)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
