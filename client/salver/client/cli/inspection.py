"""The subcommands of InspectionService."""

from __future__ import annotations

import argparse
from typing import Any

from salver.client.cli import attention_drawing as drawing
from salver.client.cli.connection import UsageError, connect
from salver.client.cli.output import as_json, read_text, table
from salver.client.types import Message

LANGUAGES = ("target_language", "source_language")


def distribution(options: argparse.Namespace, names: tuple[str, ...]) -> None:
    """What each step of sampling makes of the next token's distribution."""
    given: Any = {name: value for name in (*names, "regex") if (value := getattr(options, name)) is not None}
    text = read_text(options.text)
    prompt = [Message.user(text)] if options.chat else text
    with connect(options) as client:
        steps = client.get_distribution(prompt, num_candidates=options.show, **given)
    if options.json:
        as_json(steps)
        return
    rows = [
        (
            step.step,
            step.num_tokens,
            f"{step.removed_mass:.2%}",
            f"{step.entropy:.3f}",
            "  ".join(f"{c.token.decode('utf-8', 'replace')!r} {c.probability:.1%}" for c in step.candidates),
        )
        for step in steps
    ]
    table(("after", "tokens", "removed", "entropy", "most probable"), rows)


def attention(options: argparse.Namespace) -> None:
    """A word's attention as bars, or all of it as shades; with --out a picture.

    Of an encoder-decoder the rows are the target's, but with --kind encoder.
    """
    if options.out is not None:
        drawing.check_out(options.out)
    text = read_text(options.text)
    chosen: Any = {} if options.layer is None else {"layers": [options.layer]}
    view = "rollout" if options.rollout else "head_mean"
    if options.head is not None:
        chosen["heads"], view = [options.head], "raw"
    for name in (*LANGUAGES, "pair", "kind", "target", "truncate", "model", "timeout"):
        if (value := getattr(options, name)) is not None:
            chosen[name] = value
    with connect(options) as client:
        found = client.get_attention(text, view=view, merge_words=not options.tokens, **chosen)
    if options.json:
        as_json(found)
        return
    texts = (text, options.target or options.pair or "")
    keys, queries = (
        [texts[u.text][u.start : u.end].strip() or u.token.decode("utf-8", "replace").strip() for u in side]
        for side in (found.units, found.queries)
    )
    matrix = found.matrices[-1]
    what = {"rollout": "rollout", "head_mean": "mean of heads", "raw": f"head {options.head}"}[view]
    title = f"Attention, layer {matrix.layer} of {found.num_layers}, {what}"
    query = None if options.word is None else _query(options.word, queries)
    same = found.queries == found.units
    if options.out is not None:
        if query is None:
            picture = drawing.svg_matrix(title, queries, keys, matrix.weights)
        else:
            title = f"{title}: {queries[query]}"
            picture = drawing.svg_row(title, queries, keys, matrix.weights[query], query)
        drawing.write(options.out, title, picture)
        return
    print(title)
    if query is None:
        drawing.draw_matrix(queries, keys, matrix.weights)
    else:
        drawing.draw_row(keys, matrix.weights[query], query if same else None)


def _query(word: str, labels: list[str]) -> int:
    """The last unit of that name: a decoder's last one has seen most. Raises UsageError."""
    places = [i for i, label in enumerate(labels) if label.casefold() == word.casefold()]
    if not places:
        raise UsageError(f"--word {word!r} is none of {', '.join(labels)}")
    return places[-1]
