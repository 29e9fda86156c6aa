"""The report of `make bench-peers`: markdown. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmarks.records import Records
from benchmarks.table import MISSING, markdown, megabytes, number, share

if TYPE_CHECKING:
    from benchmarks.peers.peer import Peer

# What a token of the default model must read and compute, for the roofline; of its configuration:
# 106.2 million weights in the layers, 28.3 million in the head (which is the embedding, too).
LAYER_WEIGHTS = 106_168_320
HEAD_WEIGHTS = 28_311_552
BYTES = {"bf16": (2, 2), "int8": (1, 1), "int4": (0.625, 1)}  # of a weight in the layers, and in the head


def best_rival(records: Records, peers: Mapping[str, type[Peer]], precision: str, point: str) -> float | None:
    """The highest tokens/s at a point among the others of this precision."""
    rates = [
        rate
        for name, peer in peers.items()
        if peer.precision == precision and not peer.is_salver and (rate := records.rate(name, point))
    ]
    return max(rates, default=None)


def ceiling(roofline: Mapping[str, float], precision: str, point: str) -> float | None:
    """Tokens/s of the machine at a point, None where no simple bound says much.

    One stream reads every weight once a token. A prompt computes two operations a weight and token, the head
    only for its last one. Attention and activations are left out, so nothing reaches it.
    """
    if not roofline:
        return None
    if point == "decode_1":
        of_layers, of_head = BYTES[precision]
        return roofline["memory"] / (LAYER_WEIGHTS * of_layers + HEAD_WEIGHTS * of_head)
    if point.startswith("prefill"):
        return roofline["int8" if precision == "int4" else precision] / (2 * LAYER_WEIGHTS)
    return None


def _milliseconds(records: Records, peer: str, point: str, name: str) -> str:
    values = [records.latency(peer, point, f"{name}_p{q}") for q in (50, 95, 99)]
    if all(value is None for value in values):
        return MISSING
    return " / ".join(number(None if value is None else value * 1000) for value in values)


def _point_table(records: Records, peers: Mapping[str, type[Peer]], point: str, model: str) -> str:
    rows = [
        [
            "",
            "precision",
            "tok/s",
            "to the best peer",
            "of the roofline",
            "TTFT ms p50/p95/p99",
            "ITL ms",
            "runs",
        ]
    ]
    for name, peer in peers.items():
        rate, runs = records.rate(name, point), records.of(name, point)
        if rate is None and not runs and not records.reason(name, point):
            continue  # it was not asked for
        best = best_rival(records, peers, peer.precision, point)
        bound = ceiling(records.roofline, peer.precision, point) if model == "smollm2" else None
        rows.append(
            [
                peer.title,
                peer.precision,
                "failed" if rate is None else number(rate),
                MISSING if rate is None or not best else f"{rate / best:.2f}",
                share(None if rate is None or bound is None else rate / bound),
                _milliseconds(records, name, point, "ttft"),
                _milliseconds(records, name, point, "itl"),
                str(len(runs)),
            ]
        )
    return markdown(rows, right=2)


def _systems_table(records: Records, peers: Mapping[str, type[Peer]]) -> str:
    rows = [
        [
            "",
            "precision",
            "called by",
            "start s",
            "memory after the start",
            "after the warm-up (PSS)",
            "versions",
        ]
    ]
    for name, note in records.peers.items():
        peer = peers[name]
        rows.append(
            [
                peer.title,
                peer.precision,
                peer.way,
                number(note.start_seconds),
                megabytes(note.idle_rss),
                f"{megabytes(note.loaded_rss)} ({megabytes(note.loaded_pss)})",
                ", ".join(f"{package} {version}" for package, version in note.versions.items()),
            ]
        )
    return markdown(rows, right=3)


def _roofline_lines(records: Records) -> list[str]:
    roofline = records.roofline
    if not roofline:
        return []
    speeds = (
        f"{roofline['memory'] / 1e9:.1f} GB/s read from memory, {roofline['bf16'] / 1e9:.0f} GFLOP/s in "
        f"bfloat16, {roofline['int8'] / 1e9:.0f} GOP/s in int8"
    )
    bounds = "; ".join(
        f"{precision}: {number(ceiling(roofline, precision, 'decode_1'))} tok/s for one stream, "
        f"{number(ceiling(roofline, precision, 'prefill_512'))} for a prompt"
        for precision in BYTES
    )
    return [f"Roofline, measured in between: {speeds}. For smollm2 that bounds {bounds}.", ""]


def report(records: Records, peers: Mapping[str, type[Peer]]) -> str:
    """The machine, a table for each point, the systems and their settings, and every failure."""
    head, workload = records.machine, records.workload
    lines = [
        f"{head['cpu']}, {head['cores']} cores, load {head['load_average']} before; commit {head['commit']}; "
        f"{head['date']}",
        "",
        f"{workload['model']}, {workload['threads']} threads each, seed {workload['seed']}, medians",
        "",
        *_roofline_lines(records),
    ]
    for point, title in records.points.items():
        lines += [f"**{title}**", "", _point_table(records, peers, point, workload["model"]), ""]
    if records.peers:
        lines += [_systems_table(records, peers), ""]
        lines += [f"- {name}: {note.settings}" for name, note in records.peers.items()]
    if records.failures:
        lines += ["", *(f"- failed: {where}: {why}" for where, why in records.failures.items())]
    return "\n".join(lines)
