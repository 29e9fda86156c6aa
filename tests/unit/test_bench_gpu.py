"""The GPU's benchmark runs: in its tiny form on the CPU, in a process that has nothing but what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.gpu import main

ROOT = Path(__file__).resolve().parents[2]
# As on a machine without them.
ABSENT = ("grpc", "google.protobuf", "llguidance", "transformers", "gguf", "jinja2", "configargparse")
PROGRAM = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
from benchmarks.gpu import main
sys.exit(main(sys.argv[1:]))
"""


def test_every_part_runs_and_says_something(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--smoke", "--json", str(path)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    said = "\n".join(f"{what}: {figure}" for what, figure, _ in rows)
    assert "FAILED" not in said and "not run" not in said
    for what in (
        "logits against float32", "equal tokens, alone", "memory bandwidth", "matrix products",
        "one stream, 8B fast", "one stream, 8B exact", "saturated, 0.6B fast", "saturated, 0.6B exact",
        "outside the model", "prefill, 8B fast", "prefill, 8B exact", "gap between tokens", "transformers",
    ):  # fmt: skip
        assert what in said
    assert done.stdout.rstrip().splitlines()[-1].startswith(rows[-1][0])  # the table is last


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "no GPU" in said.err
