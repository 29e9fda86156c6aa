"""The flags of `salver serve` about who may call: TLS, tokens, and the port for probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import configargparse

from salver.server.flags import flag, port_or_off

GROUP = "Security"


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """Certificates and tokens; their files are read again when they change (see `reloading`)."""

    tls_cert: Path | None = flag(  # noqa: RUF009 - it makes a field, which is immutable
        None, GROUP, "PEM file of the server's certificate and its chain; turns TLS on", parse=Path,
        metavar="FILE", shown="plaintext",
    )  # fmt: skip
    tls_key: Path | None = flag(  # noqa: RUF009
        None, GROUP, "PEM file of its private key", parse=Path, metavar="FILE", shown="none"
    )
    tls_client_ca: Path | None = flag(  # noqa: RUF009
        None, GROUP, "PEM file of the authorities of client certificates; clients must then show one (mTLS)",
        parse=Path, metavar="FILE", shown="clients need no certificate",
    )  # fmt: skip
    tokens: Path | None = flag(  # noqa: RUF009
        None, GROUP, "TOML file of bearer tokens (their SHA-256) and tenants; calls must then carry a token. "
        "`salver token` makes entries", parse=Path, metavar="FILE", shown="calls need no token",
    )  # fmt: skip
    health_port: int | None = flag(
        None, GROUP, "one more port, plaintext, that answers grpc.health.v1 and nothing else: Kubernetes' "
        "probes cannot do TLS; 0 takes a free one, 'off' is none",
        parse=port_or_off, metavar="PORT", shown="off",
    )  # fmt: skip


def check_security(config: SecurityConfig, parser: configargparse.ArgumentParser) -> None:
    """No half of a pair, and no flag that would do nothing. Ends the program as argparse does."""
    if (config.tls_cert is None) != (config.tls_key is None):
        given, missing = ("cert", "key") if config.tls_key is None else ("key", "cert")
        parser.error(f"argument --tls-{given}: needs --tls-{missing} too")
    if config.tls_client_ca is not None and config.tls_cert is None:
        parser.error("argument --tls-client-ca: needs --tls-cert and --tls-key")
