"""What of a running engine can be changed: messages between the front and the worker, plain data.

The worker does one `Change` after the other, beside its steps, and answers each with a `Changed`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A LoRA adapter to load. `key` is what requests ask: one version of one name.

    With a `digest`, the files must be those: a worker that is started anew loads what the last one had.
    """

    key: str
    directory: str
    digest: str = ""


def adapter_sources(named: Sequence[tuple[str, str]]) -> tuple[AdapterSource, ...]:
    """What the first worker loads, of names and directories: version 1 is the first of them."""
    return tuple(AdapterSource(f"{name}@{n}", path) for n, (name, path) in enumerate(named, start=1))


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A loaded adapter; `digest` of its files in hex, `num_bytes` of memory."""

    key: str
    digest: str
    rank: int
    num_bytes: int


class Refusal(enum.Enum):
    """Why a change was not made; nothing of it was."""

    INVALID = "invalid"  # what was to be loaded is bad, and the message says what of it
    MEMORY = "memory"
    UNSUPPORTED = "unsupported"  # not of this engine, whatever were to be loaded
    BUG = "bug"


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Front to worker."""

    ticket: int
    source: AdapterSource


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Front to worker: no request will ask it any more, and none is left that does."""

    ticket: int
    key: str


@dataclass(frozen=True, slots=True)
class StageWeights:
    """Front to worker: read and check a checkpoint's weights, and hold them ready. Those staged before go."""

    ticket: int
    directory: str
    digest: str  # of its files, by the front


@dataclass(frozen=True, slots=True)
class ApplyWeights:
    """Front to worker: compute with the weights that were staged under the ticket `staged`.

    Prefixes computed before are found no more. Sequences that are there go on.
    """

    ticket: int
    staged: int


@dataclass(frozen=True, slots=True)
class DropWeights:
    """Front to worker: those are not wanted, if they still wait."""

    ticket: int
    staged: int


Change = LoadAdapter | DropAdapter | StageWeights | ApplyWeights | DropWeights


@dataclass(frozen=True, slots=True)
class Changed:
    """Worker to front: the change of this ticket is made, or refused."""

    ticket: int
    refusal: Refusal | None = None
    message: str = ""  # of a refusal
    adapter: AdapterFacts | None = None  # that was loaded
    pause: float = 0.0  # seconds that steps stood still for it
    numerics_id: str = ""  # with the weights that were applied
