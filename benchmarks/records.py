"""The JSON file of `make bench-peers`: every run so far, written after each. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import BenchError
from benchmarks.workload import Point

if TYPE_CHECKING:
    from benchmarks.peers.peer import Peer
    from benchmarks.processes import Memory

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One run of one point by one system: tokens/s, seconds."""

    peer: str
    point: str
    repeat: int
    tokens_per_second: float
    wall: float
    latencies: dict[str, float]
    notes: dict[str, float]
    date: str


@dataclass(frozen=True, slots=True)
class PeerNote:
    """What is known of a system beside its runs, at its last start. Memory in bytes, all its processes."""

    versions: dict[str, str]
    settings: str
    start_seconds: float
    idle_rss: int
    loaded_rss: int
    loaded_pss: int | None


@dataclass(slots=True)
class Records:
    """All that was measured with one version of the code and one workload."""

    path: Path
    machine: dict[str, Any]
    workload: dict[str, Any]
    points: dict[str, str] = field(default_factory=dict)  # titles by name
    peers: dict[str, PeerNote] = field(default_factory=dict)
    rooflines: list[dict[str, float]] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # reasons by "peer/point"; the last one of each

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any], workload: dict[str, Any]) -> Records:
        """The records in `path`, gone on with; new ones if it does not exist.

        Raises BenchError for records of another commit, machine or workload: they compare with nothing here.
        """
        if not path.exists():
            return cls(path, machine, workload)
        found = json.loads(path.read_text())
        if found.get("format") != FORMAT:
            raise BenchError(f"{path} has format {found.get('format')}, not {FORMAT}")
        same = (
            ("commit", found["machine"]["commit"], machine["commit"]),
            ("processor", found["machine"]["cpu"], machine["cpu"]),
            ("workload", found["workload"], workload),
        )
        for what, theirs, ours in same:
            if theirs != ours:
                raise BenchError(f"{path} is of another {what} ({theirs}, not {ours}): name another --out")
        return cls(
            path,
            found["machine"],
            workload,
            found["points"],
            {name: PeerNote(**note) for name, note in found["peers"].items()},
            found["rooflines"],
            [Record(**run) for run in found["runs"]],
            found["failures"],
        )

    def save(self) -> None:
        """All of it, in place of what the file held."""
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "workload": self.workload,
            "points": self.points,
            "peers": {name: dataclasses.asdict(note) for name, note in self.peers.items()},
            "rooflines": self.rooflines,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "failures": self.failures,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)

    def note_points(self, points: Sequence[Point], peers: Sequence[Peer]) -> None:
        """What is about to be measured; earlier failures there are forgotten, for it is tried anew."""
        self.points |= {point.name: point.title for point in points}
        for peer in peers:
            for point in ("*", *(point.name for point in points)):
                self.failures.pop(f"{peer.name}/{point}", None)

    def note_peer(self, peer: Peer, idle: Memory, loaded: Memory) -> None:
        self.peers[peer.name] = PeerNote(
            peer.about.versions, peer.about.settings, peer.start_seconds, idle.rss, loaded.rss, loaded.pss
        )
        self.save()

    def add(self, run: Record) -> None:
        self.runs.append(run)
        self.save()

    def add_roofline(self, roofline: dict[str, float]) -> None:
        self.rooflines.append(roofline)
        self.save()

    def fail(self, peer: str, point: str, reason: str) -> None:
        """`point` is `*` when it is all of them."""
        self.failures[f"{peer}/{point}"] = " ".join(reason.split())[:600]
        self.save()

    def has(self, peer: str, point: str, repeat: int) -> bool:
        return any((run.peer, run.point, run.repeat) == (peer, point, repeat) for run in self.runs)

    def of(self, peer: str, point: str) -> list[Record]:
        return [run for run in self.runs if (run.peer, run.point) == (peer, point)]

    def rate(self, peer: str, point: str) -> float | None:
        """The median of its runs, tokens/s; None without any, and when one failed."""
        runs = self.of(peer, point)
        if not runs or self.reason(peer, point):
            return None
        return statistics.median(run.tokens_per_second for run in runs)

    def latency(self, peer: str, point: str, name: str) -> float | None:
        """The median over its runs of one of figures.LATENCIES, seconds."""
        values = [run.latencies[name] for run in self.of(peer, point) if name in run.latencies]
        return statistics.median(values) if values and not self.reason(peer, point) else None

    def reason(self, peer: str, point: str) -> str | None:
        """Why it has no figure at this point, as far as that was a failure."""
        failed = self.failures.get(f"{peer}/{point}")
        return failed if failed or self.of(peer, point) else self.failures.get(f"{peer}/*")

    def failed(self, peers: Sequence[str], points: Sequence[str]) -> bool:
        """Whether any of these points of these peers has no figure."""
        return any(self.rate(peer, point) is None for peer in peers for point in points)

    @property
    def roofline(self) -> dict[str, float]:
        """The medians of all that were measured; empty without any."""
        names = self.rooflines[0] if self.rooflines else {}
        return {name: statistics.median(one[name] for one in self.rooflines) for name in names}
