"""What the command line takes."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from salver.client.cli import admin, card, chat, commands, deploy_check, encoding, inspection
from salver.client.cli.connection import add_connection_flags
from salver.client.types import BeamParams

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

EARLY_STOPPING: dict[str | None, Any] = {"yes": True, "no": False, "never": "never"}


# Of these, what does nothing to the distribution of one token.
_OF_WHOLE_ANSWERS = ("--seed", "--max-tokens")


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
    _languages(generate)
    generate.add_argument("--beams", type=int, metavar="K", help="a beam search; -n of its best answers")
    generate.add_argument(
        "--length-penalty", type=float, help="of a beam search: above 0 favours long answers (default: 1)"
    )
    generate.add_argument(
        "--early-stopping", choices=("yes", "no", "never"),
        help="of a beam search that has K answers: end at once, when better ones are unlikely, or impossible",
    )  # fmt: skip

    talk = _command(subparsers, "chat", chat.chat, "talk with a model; interactive without MESSAGE")
    talk.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="ask this alone; - reads it from standard input"
    )
    talk.add_argument("--system", help="what the system says first")
    _sampling(talk)

    score = _command(subparsers, "score", commands.score, "the log-likelihood of continuations")
    score.add_argument("context")
    score.add_argument("continuations", nargs="+", metavar="CONTINUATION")

    _encoding_commands(subparsers)
    _inspection_commands(subparsers)

    tokenize = _command(subparsers, "tokenize", commands.tokenize, "the tokens of a text")
    tokenize.add_argument("text", help="- reads it from standard input")

    detokenize = _command(subparsers, "detokenize", commands.detokenize, "the text of token ids")
    detokenize.add_argument("token_ids", nargs="+", type=int, metavar="ID")

    _command(subparsers, "models", commands.models, "what is served")
    page = _command(subparsers, "card", card.card, "what the model is made of, takes and costs")
    page.add_argument("--model", help="the served model, or one of its adapters")
    page.add_argument("--context", type=int, help="tokens of the sequences that are counted (default: 1024)")
    page.add_argument("--tensors", action="store_true", help="list every tensor")
    _command(subparsers, "info", commands.info, "the server: version, limits, start-up")

    health = _command(subparsers, "health", commands.health, "exit code 0 if and only if SERVING")
    health.add_argument("service", nargs="?", default="", help="readiness, liveness or a service's full name")
    health.add_argument("--wait", type=float, metavar="SECONDS", help="wait so long for SERVING")

    _admin_commands(subparsers)

    check = _command(
        subparsers, "deploy-check", deploy_check.deploy_check, "look at a deployment as its clients see it"
    )
    check.add_argument("where", nargs="?", metavar="ADDRESS", help="as --address")
    check.add_argument(
        "--grace", type=float, metavar="SECONDS", help="terminationGracePeriodSeconds of its pods"
    )
    check.add_argument("--metrics", metavar="URL", help="where a pod's metrics are")
    check.add_argument(
        "--watch", type=float, metavar="SECONDS",
        help="keep streams going so long and count lost ones, while you restart the pods",
    )  # fmt: skip
    check.add_argument("--streams", type=int, default=8, metavar="N", help="of --watch, at once (default 8)")
    return parser


def _encoding_commands(subparsers: Any) -> None:
    embed = _command(subparsers, "embed", encoding.embed, "the vector of a text, or how alike several are")
    embed.add_argument("texts", nargs="+", metavar="TEXT", help="- reads one from standard input")
    embed.add_argument("--dimensions", type=int, help="the first so many numbers")
    embed.add_argument("--prompt-name", help="one of the checkpoint's prompts")
    embed.add_argument("--pooling", help="cls, mean, max, last_token or weighted_mean")

    rerank = _command(subparsers, "rerank", encoding.rerank, "documents by their relevance to a query")
    rerank.add_argument("query")
    rerank.add_argument("documents", nargs="+", metavar="DOCUMENT")
    rerank.add_argument("--top-n", type=int, help="the best so many")

    classify = _command(subparsers, "classify", encoding.classify, "the labels of a text or a pair")
    classify.add_argument("text", help="- reads it from standard input")
    classify.add_argument("pair", nargs="?", help="a second text, read together with the first")
    classify.add_argument("--top-k", type=int, help="the best so many labels")

    spans = _command(subparsers, "classify-tokens", encoding.classify_tokens, "labelled spans of a text")
    spans.add_argument("text", help="- reads it from standard input")
    spans.add_argument(
        "--aggregation", default="simple", choices=("none", "simple", "first", "average", "max"),
        help="how tokens become spans (default: simple)",
    )  # fmt: skip

    fill = _command(subparsers, "fill-mask", encoding.fill_mask, "what may stand where the mask token is")
    fill.add_argument("text", help="with the model's mask token, as [MASK]; - reads it from standard input")
    fill.add_argument("--top-k", type=int, help="candidates for each mask (default: 5)")
    fill.add_argument("--targets", nargs="+", metavar="TOKEN", help="score these instead")

    answer = _command(subparsers, "answer", encoding.answer, "what in a context answers a question")
    answer.add_argument("question")
    answer.add_argument("context", help="- reads it from standard input")
    answer.add_argument("--top-k", type=int, help="the best so many (default: 1)")
    answer.add_argument("--allow-no-answer", action="store_true", default=None, help="it may have none")

    for parser in (embed, rerank, classify, spans, fill):
        parser.add_argument(
            "--truncate", action="store_true", default=None, help="leave out the end of what is too long"
        )


def _admin_commands(subparsers: Any) -> None:
    adapters = subparsers.add_parser("adapters", help="load, unload and list LoRA adapters (admin port)")
    actions = adapters.add_subparsers(title="actions", metavar="ACTION", required=True)
    load = _command(actions, "load", admin.load_adapter, "serve an adapter, or another version", admin=True)
    load.add_argument("name", help="that requests use")
    load.add_argument("directory", nargs="?", default="", help="under --adapter-root (default: NAME)")
    unload = _command(actions, "unload", admin.unload_adapter, "serve an adapter no more", admin=True)
    unload.add_argument("name")
    unload.add_argument("--abort", action="store_true", help="end its calls, in place of waiting for them")
    _command(actions, "list", admin.list_adapters, "what is loaded, and who uses it", admin=True)

    weights = subparsers.add_parser("weights", help="replace the base's weights (admin port)")
    actions = weights.add_subparsers(title="actions", metavar="ACTION", required=True)
    update = _command(actions, "update", admin.update_weights, "serve other weights", admin=True)
    update.add_argument("directory", help="a checkpoint under --weights-root")
    update.add_argument(
        "--in-flight", choices=("wait", "abort", "keep"), default="wait",
        help="calls that run are waited for (default), aborted, or go on with the new weights",
    )  # fmt: skip


def _inspection_commands(subparsers: Any) -> None:
    flags = [entry for entry in _SAMPLING if entry[0] not in _OF_WHOLE_ANSWERS]
    names = tuple(flag[2:].replace("-", "_") for flag, _, _ in flags)
    names += ("bad_words", "allowed_words", "timeout", *inspection.LANGUAGES)
    run = functools.partial(inspection.distribution, names=names)
    found = _command(subparsers, "distribution", run, "what the next token may be, step by step of sampling")
    found.add_argument("text", help="the prompt; - reads it from standard input")
    found.add_argument("--show", type=int, default=5, metavar="N", help="tokens of each step (default: 5)")
    for flag, kind, text in flags:
        found.add_argument(flag, type=kind, help=text)
    found.add_argument("--chat", action="store_true", help="the text is a message: of the answer to it")
    found.add_argument("--regex", help="of an answer that follows it")
    _languages(found)
    found.add_argument("--bad-words", nargs="+", metavar="WORD", help="never write these")
    found.add_argument("--allowed-words", nargs="+", metavar="WORD", help="write nothing but these")

    seen = _command(subparsers, "attention", inspection.attention, "which words attend to which")
    seen.add_argument("text", help="- reads it from standard input")
    seen.add_argument("--pair", metavar="TEXT", help="a second text, read together with the first (encoders)")
    seen.add_argument(
        "--target", metavar="TEXT", help="what an encoder-decoder writes: its words look at the text's"
    )
    seen.add_argument(
        "--kind", choices=("encoder", "decoder", "cross"),
        help="of an encoder-decoder: of the text to itself, the target to itself, or to the text (default)",
    )  # fmt: skip
    _languages(seen)
    seen.add_argument("--word", help="what this word attends to; all words when left out")
    seen.add_argument("--layer", type=int, help="from 0; the last when left out")
    which = seen.add_mutually_exclusive_group()
    which.add_argument("--head", type=int, help="from 0; the mean of all when left out")
    which.add_argument("--rollout", action="store_true", help="through all layers up to this one")
    seen.add_argument("--tokens", action="store_true", help="tokens in place of words")
    seen.add_argument("--out", metavar="FILE", help="a picture, .svg or .html")
    seen.add_argument("--model", help="the served model, or one of its adapters")
    seen.add_argument(
        "--truncate", action="store_true", default=None, help="leave out the end of what is too long"
    )


def _command(subparsers: Any, name: str, run: Any, text: str, admin: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text[0].upper() + text[1:]
    )
    parser.set_defaults(run=run)
    add_connection_flags(parser, admin)
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")
    return parser


def _languages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-language", metavar="CODE", help="translate into it (fr, fr_XX, fra_Latn)")
    parser.add_argument("--source-language", metavar="CODE", help="of the text to translate")


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
    group.add_argument(
        "--explain", action="store_true", default=None, help="also tell where the time went, and what it cost"
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
        "explain",
        "timeout",
        "n",
    ]
    given: dict[str, Any] = {
        name: value for name in names if (value := getattr(options, name, None)) is not None
    }
    for name in ("json_schema", "grammar"):
        if (path := getattr(options, name, None)) is not None:
            given[name] = Path(path).read_text(encoding="utf-8")
    beams = [getattr(options, name, None) for name in ("beams", "length_penalty", "early_stopping")]
    if any(value is not None for value in beams):
        given["beams"] = BeamParams(beams[0], beams[1], EARLY_STOPPING.get(beams[2]))
    return given
