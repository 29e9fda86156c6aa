"""The flags of `salver serve` about changing what it serves: the admin port, and where it may read from."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import configargparse

from salver.server.flags import flag, integer, port_or_off
from salver.server.security_config import SecurityConfig

GROUP = "Admin"
DEFAULT_MAX_ADAPTERS = 16
# Certificate, key, client CA, and what their flags begin with.
TlsFiles = tuple[Path | None, Path | None, Path | None, str]


@dataclass(frozen=True, kw_only=True)
class AdminConfig(SecurityConfig):
    """AdminService has a port of its own, and its own way to say who may call."""

    admin_port: int | None = flag(
        None, GROUP, "one more gRPC port, that answers AdminService (adapters, weights); 0 takes a free "
        "one, 'off' is none", parse=port_or_off, metavar="PORT", shown="off",
    )  # fmt: skip
    admin_host: str = flag(
        "127.0.0.1", GROUP, "address of the admin port; beyond this machine it needs --admin-token-file"
    )
    admin_token_file: Path | None = flag(  # noqa: RUF009 - it makes a field, which is immutable
        None, GROUP, "TOML file of bearer tokens (their SHA-256), as that of --tokens, that admin calls must "
        "carry one of; the tenant's name is who is logged", parse=Path, metavar="FILE",
        shown="calls need no token",
    )  # fmt: skip
    admin_tls_cert: Path | None = flag(  # noqa: RUF009
        None, GROUP, "PEM file of the admin port's certificate and its chain", parse=Path, metavar="FILE",
        shown="as --tls-cert, with its key and client CA",
    )  # fmt: skip
    admin_tls_key: Path | None = flag(  # noqa: RUF009
        None, GROUP, "PEM file of its private key", parse=Path, metavar="FILE", shown="none"
    )
    admin_tls_client_ca: Path | None = flag(  # noqa: RUF009
        None, GROUP, "PEM file of the authorities of client certificates of the admin port (mTLS)",
        parse=Path, metavar="FILE", shown="none, or that of --tls-client-ca",
    )  # fmt: skip
    adapter_root: Path | None = flag(  # noqa: RUF009
        None, GROUP, "directory whose folders are the LoRA adapters that LoadAdapter may name", parse=Path,
        metavar="DIR", shown="none can be loaded",
    )  # fmt: skip
    max_adapters: int | None = flag(
        None, GROUP, "most adapters served at a time; beyond: RESOURCE_EXHAUSTED", parse=integer(1, 4096),
        metavar="N", shown=str(DEFAULT_MAX_ADAPTERS),
    )  # fmt: skip
    weights_root: Path | None = flag(  # noqa: RUF009
        None, GROUP, "directory whose folders are the checkpoints that UpdateWeights may name", parse=Path,
        metavar="DIR", shown="weights cannot be updated",
    )  # fmt: skip

    @property
    def admin_is_open(self) -> bool:
        """Whether the admin port can be reached from beyond this machine."""
        return self.admin_port is not None and not is_loopback(self.admin_host)

    @property
    def resolved_max_adapters(self) -> int:
        return self.max_adapters or DEFAULT_MAX_ADAPTERS

    @property
    def admin_tls(self) -> TlsFiles:
        """The files of the admin port's TLS: its own, or those of the main port."""
        if self.admin_tls_cert is not None:
            return self.admin_tls_cert, self.admin_tls_key, self.admin_tls_client_ca, "--admin-tls"
        return self.tls_cert, self.tls_key, self.tls_client_ca, "--tls"


def check_admin(config: AdminConfig, parser: configargparse.ArgumentParser) -> None:
    """No flag that would do nothing, no port that strangers could use. Ends the program as argparse does."""
    flags = {
        "admin-token-file": config.admin_token_file,
        "admin-tls-cert": config.admin_tls_cert,
        "admin-tls-key": config.admin_tls_key,
        "admin-tls-client-ca": config.admin_tls_client_ca,
        "adapter-root": config.adapter_root,
        "weights-root": config.weights_root,
    }
    given = next((name for name, value in flags.items() if value is not None), None)
    if config.admin_port is None and given is not None:
        parser.error(f"argument --{given}: does nothing without --admin-port")
    if (config.admin_tls_cert is None) != (config.admin_tls_key is None):
        one, other = ("cert", "key") if config.admin_tls_key is None else ("key", "cert")
        parser.error(f"argument --admin-tls-{one}: needs --admin-tls-{other} too")
    if config.admin_tls_client_ca is not None and config.admin_tls_cert is None:
        parser.error("argument --admin-tls-client-ca: needs --admin-tls-cert and --admin-tls-key")
    if config.max_adapters is not None and config.adapter_root is None:
        parser.error("argument --max-adapters: does nothing without --adapter-root")
    if config.admin_is_open and config.admin_token_file is None:
        parser.error(
            f"argument --admin-host: {config.admin_host} is reached from beyond this machine, and anybody "
            "there could change what is served: give --admin-token-file (`salver token NAME` makes entries), "
            "or leave --admin-host at 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Of a name that is not localhost that is not known: no."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
