"""Attention as a picture: bars in a terminal, an SVG, or a page with it."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salver.client.cli.connection import UsageError
from salver.client.cli.output import table

SHADES = " ░▒▓█"
BAR = 30  # characters
Matrix = Sequence[Sequence[float]]

_CELL, _CHARACTER, _MARGIN = 26, 7.5, 16  # pixels
_FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif' font-size='13'"


def draw_row(labels: Sequence[str], row: Sequence[float], query: int | None) -> None:
    """What one unit attends to, a bar for each key. On a terminal that has rich, in colour.

    `query`: which of the keys it is itself.
    """
    best = max(row) or 1.0
    width = max(map(len, labels))
    lines = [
        (label, weight, "█" * round(BAR * weight / best), "←" if key == query else "")
        for key, (label, weight) in enumerate(zip(labels, row, strict=True))
    ]
    console = _console()
    for label, weight, bar, mark in lines:
        if console is not None:
            from rich.text import Text

            colored = (f"{bar:<{BAR}}", "cyan")
            console.print(Text.assemble(f"{label:>{width}}  ", colored, f" {weight:.3f} {mark}"))
        else:
            print(f"{label:>{width}}  {bar:<{BAR}} {weight:.3f} {mark}".rstrip())


def draw_matrix(queries: Sequence[str], keys: Sequence[str], matrix: Matrix) -> None:
    """Rows are queries; a shade for each weight, relative to the largest of the row.

    Columns have numbers, and what these are stands below where it is not the rows.
    """
    rows = []
    for label, row in zip(queries, matrix, strict=True):
        best = max(row) or 1.0
        rows.append((label, *(2 * SHADES[round((len(SHADES) - 1) * weight / best)] for weight in row)))
    table(("", *(str(key) for key in range(1, len(keys) + 1))), rows)
    if list(queries) != list(keys):
        print("  ".join(f"{number} {label}" for number, label in enumerate(keys, 1)))


def svg_matrix(title: str, queries: Sequence[str], keys: Sequence[str], matrix: Matrix) -> str:
    """A square for each weight, darker for more, with its number to be read by pointing at it."""
    margin = _label_width(queries)
    top = _label_width(keys) + 2 * _MARGIN
    parts = [_text(_MARGIN, _MARGIN + 4, title, weight="bold")]
    for place, label in enumerate(queries):
        parts.append(_text(margin + _MARGIN - 6, top + (place + 0.5) * _CELL + 4, label, anchor="end"))
    for place, label in enumerate(keys):
        x, y = margin + _MARGIN + (place + 0.5) * _CELL + 4, top - 6
        parts.append(_text(x, y, label, turn=f"rotate(-90 {x:g} {y:g})"))
    for query, row in enumerate(matrix):
        for key, weight in enumerate(row):
            hint = html.escape(f"{queries[query]} → {keys[key]}: {weight:.3f}")
            parts.append(
                f"<rect x='{margin + _MARGIN + key * _CELL:g}' y='{top + query * _CELL:g}' "
                f"width='{_CELL - 1}' "
                f"height='{_CELL - 1}' fill='#1f4e9c' fill-opacity='{min(1.0, weight):.4f}' stroke='#ccd'>"
                f"<title>{hint}</title></rect>"
            )
    width = max(margin + len(keys) * _CELL, _CHARACTER * len(title)) + 2 * _MARGIN
    return _svg(width, top + len(queries) * _CELL + _MARGIN, parts)


def svg_row(title: str, queries: Sequence[str], keys: Sequence[str], row: Sequence[float], query: int) -> str:
    """Two sentences, and lines from the query above to its keys below, thicker for more."""
    (above, end), (places, x) = _places(queries), _places(keys)
    parts = [_text(_MARGIN, _MARGIN + 4, title, weight="bold")]
    start = above[query]
    for place, weight in zip(places, row, strict=True):
        if weight >= 0.005:
            parts.append(
                f"<path d='M {start:g} 66 C {start:g} 120, {place:g} 120, {place:g} 176' fill='none' "
                f"stroke='#1f4e9c' stroke-width='{1 + 9 * weight:.2f}' "
                f"stroke-opacity='{min(1, 0.15 + weight):.3f}'/>"
            )
    for number, (label, place) in enumerate(zip(queries, above, strict=True)):
        parts.append(_text(place, 58, label, anchor="middle", weight="bold" if number == query else "normal"))
    for label, place, weight in zip(keys, places, row, strict=True):
        parts.append(_text(place, 192, label, anchor="middle"))
        parts.append(_text(place, 210, f"{weight:.0%}", anchor="middle", fill="#667"))
    return _svg(max(x, end, _MARGIN + _CHARACTER * len(title)) + _MARGIN, 226, parts)


def _places(labels: Sequence[str]) -> tuple[list[float], float]:
    """The middles of labels one beside the other, and where the last one ends."""
    places, x = [], float(_MARGIN)
    for label in labels:
        width = _CHARACTER * len(label) + 14
        places.append(x + width / 2)
        x += width
    return places, x


def write(path: str, title: str, picture: str) -> None:
    """As .svg or .html. Raises UsageError for another name, and where it cannot be written."""
    kind = Path(path).suffix.lower()
    if kind == ".html":
        picture = (
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>{html.escape(title)}</title></head>\n<body>\n{picture}</body></html>\n"
        )
    try:
        Path(path).write_text(picture, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror}") from error


def check_out(path: str) -> None:
    """Raises UsageError for a name that is neither .svg nor .html."""
    if Path(path).suffix.lower() not in (".svg", ".html"):
        raise UsageError(f"--out {path}: the name must end in .svg or .html")


def _label_width(labels: Sequence[str]) -> float:
    return _CHARACTER * max(map(len, labels)) + 12


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", turn: str = "",
    fill: str = "#112",
) -> str:  # fmt: skip
    turned = f" transform='{turn}'" if turn else ""
    return (
        f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-weight='{weight}' fill='{fill}'{turned}>"
        f"{html.escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:g}' height='{height:g}' "
        f"viewBox='0 0 {width:g} {height:g}' {_FONT}>\n"
        f"<rect width='100%' height='100%' fill='white'/>\n{inside}\n</svg>\n"
    )


def _console() -> Any:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(highlight=False)
