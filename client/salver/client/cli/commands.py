"""The subcommands, one function each; the exit code is what they return (None is 0)."""

from __future__ import annotations

import argparse
import sys

from salver.client.cli.connection import connect
from salver.client.cli.output import as_json, read_text, table
from salver.client.client import Stream
from salver.client.types import GenerateResult


def generate(options: argparse.Namespace) -> None:
    from salver.client.cli.arguments import generation_options

    given = generation_options(options)
    for name in ("target_language", "source_language"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    prompt = read_text(options.prompt)
    with connect(options) as client:
        if options.json or given.get("n", 1) > 1 or "beams" in given:
            result = client.generate(prompt, **given)
            if options.json:
                as_json(result)
                return
            for completion in result.completions:
                score = "" if completion.score is None else f" {completion.score:.4f}"
                print(f"[{completion.index}{score}] {completion.text}")
            print_explanation(result)
            return
        with client.stream_generate(prompt, **given) as stream:
            print_stream(stream)


def print_stream(stream: Stream) -> str:
    """Prints an answer as it comes; returns its text."""
    for delta in stream:
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    print_explanation(stream.result)
    return stream.result.text


def print_explanation(result: GenerateResult) -> None:
    """Where the time of a request with --explain went, the largest part first, and its bill."""
    found = result.explanation
    if found is None:
        return
    total = sum(found.causes.values())
    rows = [
        (cause.value.replace("_", " "), f"{seconds * 1000:.1f}", f"{seconds / total:.0%}")
        for cause, seconds in sorted(found.causes.items(), key=lambda item: -item[1])
    ]
    print()
    table(("cause", "ms", ""), [*rows, ("total", f"{total * 1000:.1f}", "")])
    print(f"bill: {found.device_seconds:.6f} device-seconds")


def score(options: argparse.Namespace) -> None:
    with connect(options) as client:
        pairs = [(options.context, continuation) for continuation in options.continuations]
        results = client.score(pairs, timeout=options.timeout)
    if options.json:
        as_json(results)
        return
    rows = [
        (repr(continuation), f"{result.sum:.4f}", len(result.logprobs), "yes" if result.is_greedy else "no")
        for (_, continuation), result in zip(pairs, results, strict=True)
    ]
    table(("continuation", "log-likelihood", "tokens", "greedy"), rows)


def tokenize(options: argparse.Namespace) -> None:
    with connect(options) as client:
        tokens = client.tokenize(read_text(options.text), timeout=options.timeout)
    if options.json:
        as_json(tokens)
        return
    rows = [(t.id, repr(t.token.decode("utf-8", "replace")), t.start, t.end) for t in tokens]
    table(("id", "token", "start", "end"), rows)


def detokenize(options: argparse.Namespace) -> None:
    with connect(options) as client:
        text = client.detokenize(options.token_ids, timeout=options.timeout)
    if options.json:
        as_json({"text": text})
    else:
        print(text)


def models(options: argparse.Namespace) -> None:
    with connect(options) as client:
        found = client.list_models(timeout=options.timeout)
    if options.json:
        as_json(found)
        return
    rows = [
        (m.name, m.architecture, f"{m.num_parameters:,}", m.dtype, m.max_model_len, ", ".join(m.tasks))
        for m in found
    ]
    table(("name", "architecture", "parameters", "dtype", "context", "tasks"), rows)


def info(options: argparse.Namespace) -> None:
    with connect(options) as client:
        server = client.server_info(timeout=options.timeout)
    if options.json:
        as_json(server)
        return
    rows: list[tuple[str, object]] = [
        ("version", server.version),
        ("device", server.device),
        ("torch", server.torch_version),
        ("numerics_id", server.numerics_id),
        ("drain period", f"{server.drain_period:g} s"),
        ("worker restarts", server.worker_restarts),
    ]
    rows += [(name, getattr(server.limits, name)) for name in server.limits.__dataclass_fields__]
    rows += [(f"start: {name}", f"{seconds:.3f} s") for name, seconds in server.startup_phases.items()]
    table(("", "value"), rows)


def health(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if options.wait is not None:
            client.wait_until_serving(options.wait)
        status = client.health(options.service, timeout=options.timeout)
    if options.json:
        as_json({"service": options.service, "status": status})
    else:
        print(status)
    return 0 if status == "SERVING" else 1
