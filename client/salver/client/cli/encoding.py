"""The subcommands of EncodingService."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from salver.client.cli.output import as_json, read_text, table
from salver.client.client import Client


def embed(options: argparse.Namespace) -> None:
    """One text's vector, or the similarities of several."""
    given = _given(options, "dimensions", "prompt_name", "pooling", "truncate", "timeout")
    with Client(options.address) as client:
        found = client.embed([read_text(text) for text in options.texts], **given)
    if options.json:
        as_json(found)
        return
    vectors = [embedding.values for embedding in found]
    if len(vectors) == 1:
        print(" ".join(f"{value:.6g}" for value in vectors[0]))
        return
    columns = ("cosine", *(f"{i}" for i in range(1, len(vectors) + 1)))
    rows = [
        (f"{i} {_short(text)}", *(f"{cosine(vector, other):.3f}" for other in vectors))
        for i, (text, vector) in enumerate(zip(options.texts, vectors, strict=True), start=1)
    ]
    table(columns, rows)


def rerank(options: argparse.Namespace) -> None:
    given = _given(options, "top_n", "truncate", "timeout")
    with Client(options.address) as client:
        found = client.rerank(options.query, options.documents, **given)
    if options.json:
        as_json(found)
        return
    rows = [(f"{r.score:.4f}", r.index, _short(options.documents[r.index], 90)) for r in found]
    table(("score", "index", "document"), rows)


def classify(options: argparse.Namespace) -> None:
    given = _given(options, "top_k", "truncate", "timeout")
    text = read_text(options.text)
    with Client(options.address) as client:
        found = client.classify((text, options.pair) if options.pair is not None else text, **given)
    if options.json:
        as_json(found)
        return
    table(("label", "score"), [(label.label, f"{label.score:.4f}") for label in found[0].labels])


def classify_tokens(options: argparse.Namespace) -> None:
    given = _given(options, "aggregation", "truncate", "timeout")
    with Client(options.address) as client:
        found = client.classify_tokens(read_text(options.text), **given)
    if options.json:
        as_json(found)
        return
    rows = [(s.label, f"{s.score:.4f}", repr(s.text), s.start, s.end) for s in found[0].spans]
    table(("label", "score", "text", "start", "end"), rows)


def fill_mask(options: argparse.Namespace) -> None:
    given = _given(options, "top_k", "targets", "truncate", "timeout")
    with Client(options.address) as client:
        found = client.fill_mask(read_text(options.text), **given)
    if options.json:
        as_json(found)
        return
    rows = [
        (number, repr(c.token), f"{c.probability:.4f}")
        for number, mask in enumerate(found[0], start=1)
        for c in mask.candidates
    ]
    table(("mask", "token", "probability"), rows)


def answer(options: argparse.Namespace) -> None:
    given = _given(options, "top_k", "allow_no_answer", "timeout")
    with Client(options.address) as client:
        found = client.extract_answer(options.question, read_text(options.context), **given)
    if options.json:
        as_json(found)
        return
    rows = [("(no answer)" if a.no_answer else a.text, f"{a.score:.4f}", a.start, a.end) for a in found]
    table(("answer", "score", "start", "end"), rows)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the angle between two vectors; 0 where one is all zeros."""
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def _short(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _given(options: argparse.Namespace, *names: str) -> Any:
    return {name: value for name in names if (value := getattr(options, name)) is not None}
