"""The systems that `make bench-peers` measures: one small file each behind the `Peer` protocol."""

from __future__ import annotations

from benchmarks.peers import llamacpp, openvino, own, transformers, vllm
from benchmarks.peers.peer import OWN, Peer, Setting

__all__ = ["PEERS", "Peer", "Setting", "make_peers"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        own.SalverBfloat16,
        own.SalverInt8,
        own.SalverInt4,
        llamacpp.Bfloat16,
        llamacpp.Q8,
        llamacpp.Q4,
        openvino.Int8,
        openvino.Int4,
        openvino.Bfloat16,
        vllm.Bfloat16,
        transformers.Bfloat16,
    )
}
"""By name, in the order of the table."""

assert all(name.startswith(OWN) == peer.is_salver for name, peer in PEERS.items())


def make_peers(names: list[str], setting: Setting) -> list[Peer]:
    """The named ones, not yet installed or started."""
    return [PEERS[name](setting) for name in names]
