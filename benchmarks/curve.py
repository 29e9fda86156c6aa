"""A line chart as an SVG file: for curves in docs/. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import count

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 50, 55
COLOURS = ("#1565c0", "#c62828", "#2e7d32", "#6a1b9a")
INK, GRID = "#333333", "#dddddd"


def nice_step(largest: float, most: int = 8) -> float:
    """The smallest 1, 2 or 5 times a power of ten that cuts 0 to `largest` into at most `most` parts.

    Raises ValueError unless `largest` is above 0.
    """
    if largest <= 0:
        raise ValueError("nothing to cut")
    for exponent in count(-9):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            if largest / step <= most:
                return step
    raise AssertionError("powers of ten end nowhere")


def chart(title: str, x_name: str, y_name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The SVG of one line for each name; both axes begin at 0. Raises ValueError for no points."""
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("no points")
    x_most = max(x for x, _ in points) or 1.0
    y_most = (max(y for _, y in points) or 1.0) * 1.08
    x_step, y_step = nice_step(x_most), nice_step(y_most)

    def x_of(value: float) -> float:
        return LEFT + value / x_most * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - value / y_most * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 20, title, "start", ' font-weight="bold"'),
    ]
    for number in range(int(x_most / x_step + 1e-9) + 1):
        x = x_of(number * x_step)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        parts.append(text(x, HEIGHT - BOTTOM + 18, f"{number * x_step:g}"))
    for number in range(int(y_most / y_step + 1e-9) + 1):
        y = y_of(number * y_step)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{number * y_step:g}", "end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_name))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(18, middle, y_name, more=f' transform="rotate(-90 18 {middle:.1f})"'))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += (f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4" fill="{colour}"/>' for x, y in line)
        x = LEFT + 10 + number * (WIDTH - LEFT - RIGHT) / len(lines)
        parts.append(f'<rect x="{x:.1f}" y="30" width="14" height="10" fill="{colour}"/>')
        parts.append(text(x + 20, 40, name, "start"))
    return "\n".join([*parts, "</svg>", ""])
