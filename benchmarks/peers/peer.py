"""What every measured system is to the benchmark, and how an environment of its own is made, once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from benchmarks.figures import BenchError, Trace
from benchmarks.workload import BenchRequest

OWN = "salver-"
"""What the names of our own rows start with."""
TORCH = "torch==2.13.0"
"""Named alone and first: as a dependency it resolves to a build with gigabytes of CUDA libraries."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the peers live and what they all get: the same checkpoint, threads and vocabulary."""

    folder: Path  # each peer's environment is a folder in it
    checkpoint: Path  # the Hugging Face directory that Salver's worker loads (bfloat16)
    model: str  # as for `salver serve`
    source: Path | None  # the GGUF file that the checkpoint was made from, if it was
    cache_dir: Path
    threads: int
    vocab_size: int
    max_model_len: int
    serve_args: tuple[str, ...] = ()


@dataclass(slots=True)
class About:
    """What the table says of a peer beside its figures."""

    versions: dict[str, str] = field(default_factory=dict)
    settings: str = ""


class Peer(ABC):
    """One row of each table: a system in one precision. Every method raises BenchError, which says why."""

    name: ClassVar[str]
    title: ClassVar[str]
    precision: ClassVar[str]  # "bf16", "int8" or "int4": ratios are among equals
    way: ClassVar[str]  # how it is called: "gRPC", "HTTP" or "in process"
    is_salver: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.about = About()
        self.start_seconds = 0.0

    @property
    def home(self) -> Path:
        """The folder of its environment; the precisions of one system share it."""
        return self.setting.folder / self.name.rsplit("-", 1)[0]

    @abstractmethod
    def install(self) -> None:
        """Everything that is done once: packages, builds, conversions. Later calls return at once."""

    @abstractmethod
    def start(self) -> None:
        """Returns once it would answer; sets `start_seconds`, the wall time that took, and `about`."""

    @abstractmethod
    def run(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        """Sends each request at its time; the traces, and the wall time in seconds."""

    @abstractmethod
    def stop(self) -> None:
        """Ends it; also right when it never started."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The root of its processes, for their memory and CPU time."""


def call(command: Sequence[str | Path], *, log: Path, env: dict[str, str] | None = None) -> None:
    """Runs a command of an installation; its output goes to the end of `log`. Raises BenchError."""
    with log.open("a") as out:
        print("$", *command, file=out, flush=True)
        try:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        except OSError as error:
            raise BenchError(f"{command[0]}: {error}") from error
    if ended.returncode:
        tail = " ".join(log.read_text(errors="replace").splitlines()[-3:])
        raise BenchError(f"{Path(command[0]).name} ended with {ended.returncode} (see {log}): {tail}")


def once(home: Path, what: str, do: Callable[[Path], None]) -> None:
    """Calls `do(log)` unless it has succeeded in `home` before: `.WHAT.done` says so.

    `what` carries what the outcome depends on, such as versions: other ones are done anew.
    """
    done = home / f".{what}.done"
    if done.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    do(home / f"{what}.log")
    done.touch()


def make_environment(home: Path, log: Path, *installs: Sequence[str]) -> Path:
    """A fresh virtual environment in `home`, with one `pip install` for each of `installs`; its python."""
    venv = home / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    call([sys.executable, "-m", "venv", venv], log=log)
    python = venv / "bin" / "python"
    for packages in installs:
        call([python, "-m", "pip", "--disable-pip-version-check", "-q", "install", *packages], log=log)
    return python
