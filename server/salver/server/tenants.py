"""Who calls: bearer tokens, the tenants that they stand for, and what those may use.

The file of `--tokens` holds no token, only the SHA-256 of each. A token is 256 random bits, so
there is nothing to guess and a slow hash would guard nothing. `salver token` makes entries.

    [[tokens]]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    tenant = "search"
    expires = 2027-01-31T00:00:00Z        # never, when left out

    [tenants.search]                      # each line may be left out
    weight = 2.0                          # share of the engine while others wait; 1
    tokens_per_second = 5000              # prompt and generated tokens; no bound
    burst_tokens = 50000                  # that may come at once; ten seconds of the rate
    services = ["GenerationService"]      # of salver.v1; all
"""

from __future__ import annotations

import datetime
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from salver.server.reloading import BadFile, Reloading, read

_BURST_SECONDS = 10.0
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class UnknownToken(Exception):
    """No token, or none that is valid; the message says which."""


class Allowance:
    """A bucket of tokens that fills at `rate` a second up to `burst`.

    What is used is taken when it is known, also below zero: a tenant in debt waits until the rate
    has paid for it. So a bound in tokens needs no guess at how long an answer will be.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate: float | None = None
        self._burst = 0.0
        self._left = 0.0
        self._at = 0.0
        self._clock = clock

    def set(self, rate: float | None, burst: float) -> None:
        """The terms, new or again; what was used counts on."""
        if self.rate is None:
            self._left, self._at = burst, self._clock()
        self.rate, self._burst = rate, burst

    def take(self, tokens: int) -> None:
        if self.rate is not None:
            self._fill(self.rate)
            self._left -= tokens

    def wait(self) -> float:
        """Seconds until nothing is owed; 0 when that is now."""
        if self.rate is None:
            return 0.0
        self._fill(self.rate)
        return max(0.0, -self._left / self.rate)

    def _fill(self, rate: float) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * rate)
        self._at = now


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody whose calls are told apart. `services` are full names; None is all."""

    name: str = ""
    weight: float = 1.0
    services: frozenset[str] | None = None
    allowance: Allowance = field(default_factory=Allowance, compare=False)

    def may_call(self, method: str) -> bool:
        """Whether it may call `/package.Service/Method`."""
        return self.services is None or method.split("/")[1] in self.services

    def salted(self, cache_salt: str) -> str:
        """The cache salt of its requests: no two tenants have one in common, whatever they ask for."""
        return f"{self.name}\0{cache_salt}" if self.name else cache_salt


ANYBODY = Tenant()


@dataclass(frozen=True, slots=True)
class _Token:
    tenant: Tenant
    expires: float | None  # seconds of the epoch


class Tenants:
    """The tokens and tenants of a file, read again when it changes."""

    def __init__(
        self,
        path: Path,
        reloaded: Callable[[str, bool], None] = lambda what, good: None,
        *,
        flag: str = "--tokens",
        settings: bool = True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """The file is that of `flag`; without `settings` it has no [tenants]. Raises BadFile."""
        self._now = now
        self._allowances: dict[str, Allowance] = {}

        def load() -> dict[bytes, _Token]:
            # What a tenant has used stays used when the file changes.
            content = read(path, flag)
            found = _parse(
                content, f"{flag} {path}", lambda name: self._allowances.setdefault(name, Allowance(clock))
            )
            if not settings and "tenants" in tomllib.loads(content.decode("utf-8")):
                raise BadFile(f"{flag} {path}: has [tenants], which do nothing here")
            return found

        self._tokens = Reloading(flag.removeprefix("--").replace("-", "_"), [path], load, reloaded, clock)

    def of_token(self, token: str) -> Tenant:
        """Whose token it is. Raises UnknownToken.

        Looked up by its hash, so what the look-up takes tells nothing about the tokens.
        """
        found = self._tokens.current().get(sha256(token.encode()).digest())
        if found is None:
            raise UnknownToken("the token is not known")
        if found.expires is not None and found.expires <= self._now():
            raise UnknownToken("the token has expired")
        return found.tenant

    @property
    def names(self) -> frozenset[str]:
        return frozenset(token.tenant.name for token in self._tokens.current().values())


def _parse(content: bytes, where: str, allowance: Callable[[str], Allowance]) -> dict[bytes, _Token]:
    """Tokens by their digest. Raises BadFile, which quotes nothing that could be a token."""

    def bad(reason: str) -> BadFile:
        return BadFile(f"{where}: {reason}")

    try:
        file = tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise bad(f"is not TOML: {error}") from None
    if unknown := sorted(file.keys() - {"tokens", "tenants"}):
        raise bad(f"unknown key {unknown[0]!r}: there are [[tokens]] and [tenants.NAME]")
    entries, settings = file.get("tokens", []), file.get("tenants", {})
    if not isinstance(entries, list) or not isinstance(settings, dict):
        raise bad("tokens must be [[tokens]] and tenants [tenants.NAME]")
    tenants: dict[str, Tenant] = {}
    tokens: dict[bytes, _Token] = {}
    for number, entry in enumerate(entries, start=1):
        place = f"token {number}"
        if not isinstance(entry, dict) or entry.keys() - {"sha256", "tenant", "expires"}:
            raise bad(f"{place}: must have sha256, tenant and perhaps expires")
        digest, name = entry.get("sha256"), entry.get("tenant")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise bad(f"{place}: sha256 must be 64 hexadecimal digits (`salver token` makes them)")
        if not isinstance(name, str) or not _TENANT.fullmatch(name):
            raise bad(f"{place}: tenant must be up to 63 letters, digits, '.', '_' and '-'")
        if name not in tenants:
            tenants[name] = _tenant(name, settings.get(name, {}), allowance, bad)
        key = bytes.fromhex(digest)
        if key in tokens:
            raise bad(f"{place}: stands there twice")
        expires = entry.get("expires")
        if expires is not None and (not isinstance(expires, datetime.datetime) or expires.tzinfo is None):
            raise bad(f"{place}: expires must be a time with its zone, as 2027-01-31T00:00:00Z")
        tokens[key] = _Token(tenants[name], None if expires is None else expires.timestamp())
    if idle := sorted(settings.keys() - tenants.keys()):
        raise bad(f"tenant {idle[0]!r} has no token")
    if not tokens:
        raise bad("holds no token: nobody could call")
    # Only once all of it is good.
    for tenant in tenants.values():
        rate = settings.get(tenant.name, {}).get("tokens_per_second")
        burst = settings.get(tenant.name, {}).get("burst_tokens", (rate or 0) * _BURST_SECONDS)
        tenant.allowance.set(rate, burst)
    return tokens


def _tenant(
    name: str, settings: Any, allowance: Callable[[str], Allowance], bad: Callable[[str], BadFile]
) -> Tenant:
    keys = {"weight", "tokens_per_second", "burst_tokens", "services"}
    if not isinstance(settings, Mapping) or settings.keys() - keys:
        raise bad(f"tenant {name!r}: may have {', '.join(sorted(keys))}")
    for key in ("weight", "tokens_per_second", "burst_tokens"):
        value = settings.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise bad(f"tenant {name!r}: {key} must be a number above 0")
    if "burst_tokens" in settings and "tokens_per_second" not in settings:
        raise bad(f"tenant {name!r}: burst_tokens does nothing without tokens_per_second")
    services = settings.get("services")
    if services is not None and (
        not isinstance(services, list) or not services or not all(isinstance(s, str) for s in services)
    ):
        raise bad(f"tenant {name!r}: services must be a list of names, as ['GenerationService']")
    return Tenant(
        name,
        float(settings.get("weight", 1.0)),
        None if services is None else frozenset(s if "." in s else f"salver.v1.{s}" for s in services),
        allowance(name),
    )
