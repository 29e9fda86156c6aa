"""What the command line takes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from salver.client.cli import chat, commands

_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("--temperature", float, "0 is greedy"),
    ("--top-p", float, "keep the most probable tokens that reach this probability together"),
    ("--top-k", int, "keep this many most probable tokens"),
    ("--min-p", float, "drop tokens less probable than this share of the best"),
    ("--typical-p", float, "keep the tokens of the most typical surprise that reach this probability"),
    ("--repetition-penalty", float, "above 1 discourages tokens of prompt and output"),
    ("--presence-penalty", float, "subtracted from the logits of tokens in the output"),
    ("--frequency-penalty", float, "the same, once per occurrence"),
    ("--no-repeat-ngram-size", int, "no so many tokens occur twice"),
    ("--seed", int, "makes the answer reproducible"),
    ("--max-tokens", int, "the end of the context when left out"),
    ("--min-tokens", int, "do not stop before"),
    ("--model", str, "the served model, or one of its adapters"),
    ("--priority", int, "-10 to 10, higher is sooner"),
)


def build_parser(plugins: list[str]) -> argparse.ArgumentParser:
    """The whole parser; `plugins` are named in the help alone."""
    epilog = f"further commands, each with its own --help: {', '.join(plugins)}" if plugins else None
    parser = argparse.ArgumentParser(
        prog="salver",
        description="Calls a Salver server, which serves transformer models over gRPC.",
        epilog=epilog,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(subparsers, "generate", commands.generate, "complete a prompt")
    generate.add_argument("prompt", help="the text to go on from; - reads it from standard input")
    _sampling(generate)
    generate.add_argument("-n", type=int, help="so many samples (prints them when all are done)")

    talk = _command(subparsers, "chat", chat.chat, "talk with a model; interactive without MESSAGE")
    talk.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="ask this alone; - reads it from standard input"
    )
    talk.add_argument("--system", help="what the system says first")
    _sampling(talk)

    score = _command(subparsers, "score", commands.score, "the log-likelihood of continuations")
    score.add_argument("context")
    score.add_argument("continuations", nargs="+", metavar="CONTINUATION")

    tokenize = _command(subparsers, "tokenize", commands.tokenize, "the tokens of a text")
    tokenize.add_argument("text", help="- reads it from standard input")

    detokenize = _command(subparsers, "detokenize", commands.detokenize, "the text of token ids")
    detokenize.add_argument("token_ids", nargs="+", type=int, metavar="ID")

    _command(subparsers, "models", commands.models, "what is served")
    _command(subparsers, "info", commands.info, "the server: version, limits, start-up")

    health = _command(subparsers, "health", commands.health, "exit code 0 if and only if SERVING")
    health.add_argument("service", nargs="?", default="", help="readiness, liveness or a service's full name")
    health.add_argument("--wait", type=float, metavar="SECONDS", help="wait so long for SERVING")
    return parser


def _command(subparsers: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text[0].upper() + text[1:]
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--address",
        default=os.environ.get("SALVER_ADDRESS", "127.0.0.1:50051"),
        help="of the server, or of several with commas between them, or a gRPC target like dns:///name:port "
        "(SALVER_ADDRESS; default 127.0.0.1:50051)",
    )
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")
    return parser


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    for flag, kind, text in _SAMPLING:
        group.add_argument(flag, type=kind, help=text)
    group.add_argument("--stop", action="append", help="end at this text (may be given several times)")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="JSON that this JSON Schema describes")
    form.add_argument("--json-object", action="store_true", default=None, help="any JSON object")
    form.add_argument("--regex", help="the whole text matches this regular expression")
    form.add_argument("--grammar", metavar="FILE", help="a text of this grammar (Lark's syntax)")
    form.add_argument("--choice", nargs="+", metavar="TEXT", help="one of these texts")
    group.add_argument("--bad-words", nargs="+", metavar="WORD", help="never write these")
    group.add_argument("--allowed-words", nargs="+", metavar="WORD", help="write nothing but these")
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on past the end of sequence"
    )


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the generation flags, as keyword arguments of the client."""
    names = [flag[2:].replace("-", "_") for flag, _, _ in _SAMPLING]
    names += [
        "json_object",
        "regex",
        "choice",
        "stop",
        "bad_words",
        "allowed_words",
        "ignore_eos",
        "timeout",
        "n",
    ]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    for name in ("json_schema", "grammar"):
        if (path := getattr(options, name, None)) is not None:
            given[name] = Path(path).read_text(encoding="utf-8")
    return given
