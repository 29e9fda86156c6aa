"""What is released needs what it imports, and nothing without bounds; what is installed is within them."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from unit.test_imports import imports_of, sources

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
RELEASED = ("", "cli", "server", "otel")  # extras that users install; the others are ours


def requirements(*extras: str) -> list[Requirement]:
    """Of these extras ("" is what every install has), without those on ourselves."""
    lines = [
        line
        for extra in extras
        for line in (PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    ]
    return [found for found in map(Requirement, lines) if found.name != "salver"]


@pytest.mark.parametrize("requirement", requirements(*RELEASED), ids=lambda found: found.name)
def test_a_range(requirement: Requirement) -> None:
    """It has both ends, and what these tests ran with is inside."""
    assert {">=", "<"} == {part.operator for part in requirement.specifier}
    assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_what_is_imported_is_declared() -> None:
    declared = {canonicalize_name(found.name) for found in requirements(*RELEASED)}
    distributions = importlib.metadata.packages_distributions()
    seen: set[str] = set()
    missing = []
    for module, path in sources().items():
        for line, name in imports_of(module, path):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in ("salver", "triton"):  # torch for CUDA brings triton
                continue
            owners = {canonicalize_name(owner) for owner in distributions.get(top, [top])}
            seen |= owners & declared
            if not owners & declared:
                missing.append(f"{path.relative_to(REPOSITORY)}:{line} imports {name}")
    assert not missing, "\n".join(missing)
    assert len(seen) > 10, seen
