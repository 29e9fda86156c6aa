"""Where the servers are: what a user writes becomes one gRPC target."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

Address = str | Sequence[str]

_SCHEME = re.compile(r"^(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|passthrough):", re.IGNORECASE)


class AddressError(ValueError):
    """Not an address, or a name that cannot be looked up."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a channel connects to; `several` when there may be more than one server behind it."""

    uri: str
    several: bool


def to_target(address: Address) -> Target:
    """A gRPC target of `host:port`, of several (a sequence, or with commas), or of any gRPC target.

    The names of several servers are looked up here, once: gRPC takes lists of IP addresses alone.
    Use `dns:///name:port` where what a name stands for changes.

    Raises AddressError for what is no address, and for a name that cannot be looked up.
    """
    if isinstance(address, str):
        if _SCHEME.match(address):
            return Target(address, address.lower().startswith("dns:") or "," in address)
        address = address.split(",")
    hosts = [part.strip() for part in address if part.strip()]
    if not hosts:
        raise AddressError("no address: give host:port, several of them, or a gRPC target")
    if len(hosts) == 1:
        return to_target(hosts[0]) if _SCHEME.match(hosts[0]) else Target(hosts[0], False)
    found = dict.fromkeys(place for host in hosts for place in _look_up(host))
    if all(family == socket.AF_INET for family, _, _ in found):
        return Target("ipv4:" + ",".join(f"{ip}:{port}" for _, ip, port in found), True)
    # Of mixed kinds: an IPv4 address has a form among the IPv6 ones.
    mapped = (f"::ffff:{ip}" if family == socket.AF_INET else ip for family, ip, _ in found)
    places = (f"[{ip}]:{port}" for ip, (_, _, port) in zip(mapped, found, strict=True))
    return Target("ipv6:" + ",".join(places), True)


def _look_up(address: str) -> list[tuple[int, str, int]]:
    """(family, IP, port) of everything that a host:port stands for."""
    if _SCHEME.match(address):
        raise AddressError(f"{address!r} in a list of addresses: give host:port there")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or (":" in host and not host.startswith("[")):
        raise AddressError(f"{address!r} is not host:port (an IPv6 address in brackets)")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot look up {host!r}: {error.strerror or error}") from error
    return [(family, str(place[0]), int(port)) for family, _, _, _, place in found]
