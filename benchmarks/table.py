"""The report: a markdown table of the points, and the lines around it. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import PointResult, Side

MISSING = "-"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, or all digits before the point; `-` for None."""
    if value is None:
        return MISSING
    if value == 0:
        text = "0"
    elif abs(value) >= 100:
        text = f"{value:.0f}"
    elif abs(value) >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}"
    return text + unit


def milliseconds(p50: float | None, p95: float | None) -> str:
    """`p50 / p95`, given in seconds."""
    if p50 is None and p95 is None:
        return MISSING
    return " / ".join(number(None if value is None else value * 1000) for value in (p50, p95))


def share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def megabytes(value: int | None) -> str:
    """Decimal megabytes of a number of bytes."""
    return MISSING if value is None else f"{value / 1e6:.0f} MB"


def markdown(rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A table of which the first row is the head; columns from `right` on are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < right else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < right else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def _figure(side: Side) -> str:
    if side.errors:
        return "failed"
    return number(side.tokens_per_second)


def _latency(side: Side, name: str) -> str:
    return milliseconds(side.latency(f"{name}_p50"), side.latency(f"{name}_p95"))


def _cell(text: str) -> str:
    """One line, no pipes: fit for a table's cell or a list's item."""
    return " ".join(text.replace("|", "/").split())


def points_table(results: Sequence[PointResult]) -> str:
    """One row a point: tokens/s on both sides, ratio, latencies in ms, the share outside the model.

    A point of which a run failed has no figures; its row says `failed` and a line below says why.
    """
    head = [
        "point",
        "Salver tok/s",
        "transformers tok/s",
        "ratio",
        "TTFT ms p50 / p95",
        "ITL ms p50 / p95",
        "transformers TTFT",
        "transformers ITL",
        "outside the model",
        "same tokens",
    ]
    rows = [head]
    for result in results:
        ratio, same = result.ratio, result.same_outputs
        rows.append(
            [
                result.point.title,
                _figure(result.salver),
                _figure(result.baseline),
                MISSING if ratio is None else f"{ratio:.2f}",
                _latency(result.salver, "ttft"),
                _latency(result.salver, "itl"),
                _latency(result.baseline, "ttft"),
                _latency(result.baseline, "itl"),
                share(result.salver.outside_model_share),
                MISSING if same is None else f"{same[0]}/{same[1]}",
            ]
        )
    reasons = [
        f"- failed: {result.point.title}, {name}: {_cell(error)}"
        for result in results
        for name, side in (("Salver", result.salver), ("transformers", result.baseline))
        for error in side.errors
    ]
    return "\n".join([markdown(rows), *(["", *reasons] if reasons else [])])


def phases_table(phases: Sequence[tuple[str, float]], total: float) -> str:
    """The start-up phases in seconds, and the wall time from the command to SERVING."""
    rows = [["start-up phase", "s"], *([name, f"{seconds:.3f}"] for name, seconds in phases)]
    return markdown([*rows, ["command to SERVING, wall", f"{total:.3f}"]])
