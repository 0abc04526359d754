"""Certificates and tokens as operators have them, and channels that show them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A certificate with its key, in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Vouches for servers and clients."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.root = self._ca.cert_pem.bytes()
        """Its own certificate, in PEM."""

    def server(self) -> Identity:
        """Vouch for a server of this host."""
        return self._issue("localhost", "127.0.0.1")

    def client(self, *names: str, common_name: str | None = None) -> Identity:
        """Vouch for a client; ``names`` are alternative ones."""
        return self._issue(*names, common_name=common_name)

    def _issue(self, *names: str, common_name: str | None = None) -> Identity:
        leaf = self._ca.issue_cert(*names, common_name=common_name)
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        return Identity(certificate=chain, key=leaf.private_key_pem.bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFiles:
    """Where a server finds what it shows."""

    certificate: Path
    key: Path

    @classmethod
    def of(cls, folder: Path, identity: Identity) -> ServerFiles:
        """Write them."""
        files = cls(certificate=folder / "server.pem", key=folder / "server.key")
        files.write(identity)
        return files

    def write(self, identity: Identity) -> None:
        """Write others in their place."""
        self.certificate.write_bytes(identity.certificate)
        self.key.write_bytes(identity.key)

    @property
    def flags(self) -> list[str]:
        """The server's flags."""
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]


def tls_channel(
    address: str, root: bytes, *, client: Identity | None = None, token: str | None = None
) -> grpc.Channel:
    """Return a channel that trusts ``root``, and shows who it is."""
    credentials = grpc.ssl_channel_credentials(
        root, client.key if client else None, client.certificate if client else None
    )
    if token is not None:
        calls = grpc.access_token_call_credentials(token)
        credentials = grpc.composite_channel_credentials(credentials, calls)
    # Or channels to one address would share a connection, made with the certificates of the first.
    return grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])


def token_file(path: Path, tokens: Iterable[tuple[str, str]]) -> Path:
    """Write what a server must know of tokens, each with its tenant, without the server's code."""
    entries = [
        f'[[token]]\ntenant = "{tenant}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
        for tenant, token in tokens
    ]
    path.write_text("".join(entries))
    return path
