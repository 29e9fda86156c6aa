"""The subcommands of InspectionService."""

from __future__ import annotations

import argparse
from typing import Any

from salver.client.cli.connection import connect
from salver.client.cli.output import as_json, read_text, table


def distribution(options: argparse.Namespace, names: tuple[str, ...]) -> None:
    """What each step of sampling makes of the next token's distribution."""
    given: Any = {name: value for name in names if (value := getattr(options, name)) is not None}
    with connect(options) as client:
        steps = client.get_distribution(read_text(options.text), num_candidates=options.show, **given)
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
