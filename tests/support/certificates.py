"""Certificates of a made-up authority, as files, and files of tokens."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import trustme

from salver.client import Tls


class Authority:
    """Writes certificates into a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._authority = trustme.CA()
        self.directory = directory
        self.ca = directory / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *identities: str) -> tuple[Path, Path]:
        """(certificate chain, key) for these identities, in files `name`.pem and `name`.key."""
        made = self._authority.issue_cert(*(identities or ("localhost", "127.0.0.1")))
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        replace(cert, b"".join(pem.bytes() for pem in made.cert_chain_pems))
        replace(key, made.private_key_pem.bytes())
        return cert, key

    def client(self, name: str | None = None) -> Tls:
        """What a client needs: the authority, and a certificate of its own when named."""
        if name is None:
            return Tls(ca=self.ca)
        cert, key = self.issue(name, f"{name}@example.org")
        return Tls(ca=self.ca, cert=cert, key=key)


def replace(path: Path, content: bytes) -> None:
    """In one moment, as Kubernetes replaces what it mounts."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)


def token_file(path: Path, *tokens: tuple[str, str], more: str = "") -> Path:
    """A file for --tokens with each (token, tenant), and further lines."""
    entries = (
        f'[[tokens]]\nsha256 = "{sha256(token.encode()).hexdigest()}"\ntenant = "{tenant}"\n'
        for token, tenant in tokens
    )
    replace(path, ("".join(entries) + more).encode())
    return path
