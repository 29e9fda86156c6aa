"""How much memory is free: the machine's, or the container's if it has less."""

from __future__ import annotations

from pathlib import Path

from salver.server.engine.host_memory import free_bytes

MEMINFO = "MemTotal: 100 kB\nMemAvailable: 90 kB\nHugePages_Total: 0\n"


def test_the_smaller_of_both(tmp_path: Path) -> None:
    meminfo, nowhere = tmp_path / "meminfo", tmp_path / "nowhere"
    assert free_bytes(nowhere, nowhere) is None
    meminfo.write_text(MEMINFO)
    assert free_bytes(meminfo, nowhere) == 90 * 1024
    (tmp_path / "memory.current").write_text("5000\n")
    for limit, free in (("max\n", 90 * 1024), ("9000\n", 4700), ("4000\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 700\n")
        assert free_bytes(meminfo, tmp_path) == free
    here = free_bytes()
    assert here is None or here > 0
