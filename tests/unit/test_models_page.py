"""docs/models.md lists what the code serves."""

from __future__ import annotations

from pathlib import Path

from salver.model.families import supported

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- supported: begin -->\n", "<!-- supported: end -->"


def test_the_list_is_that_of_the_code() -> None:
    rows = [f"| `{architecture}` | {described} |" for architecture, described in supported()]
    expected = "\n".join(["| `architectures` | family |", "|---|---|", *rows, ""])
    listed = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert listed == expected, f"put this into {PAGE}:\n{expected}"


def test_every_family_says_what_it_is() -> None:
    assert all(len(described) > 10 for _, described in supported())
