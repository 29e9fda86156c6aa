"""The front process stays light: whatever it is asked, torch never gets into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.serving import Server


def test_the_front_never_maps_torch(tiny: Server) -> None:
    """Not by an import of its own, and not by what the worker sends it (a pickled torch type would)."""
    tiny.tokens("warm", max_tokens=2)
    maps = Path(f"/proc/{tiny.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "libtorch" not in maps.read_text()
    assert "libtorch" in Path(f"/proc/{tiny.worker.pid}/maps").read_text()
