"""How a client proves who it is, and makes sure of who it talks to."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import grpc

from optserve_client.config import ClientConfig, Tls, Token

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_LOCAL_SCHEMES = ("unix:", "unix-abstract:")


def metadata_of(target: str, config: ClientConfig) -> Callable[[], Metadata]:
    """Return what gives the metadata of each call.

    Raises:
        ValueError: There is a token that anybody on the way could read.
        OSError: The file of the token cannot be read.
    """
    if config.token is None:
        return lambda: ()
    if not (config.tls or config.allow_plaintext_token or is_local(target)):
        raise ValueError(
            f"on the way to {target} anybody could read the token: use tls=Tls(...),"
            " or say allow_plaintext_token=True"
        )
    token = _reader(config.token)
    token()  # What cannot be read is best known now.
    return lambda: (("authorization", f"Bearer {token()}"),)


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Return what encrypts a channel.

    Raises:
        OSError: A file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca),
        private_key=_read(tls.key),
        certificate_chain=_read(tls.certificate),
    )


def is_local(target: str) -> bool:
    """Return whether what is sent to a target, as gRPC names it, stays on this host."""
    if target.startswith(_LOCAL_SCHEMES):
        return True
    scheme, _, rest = target.partition(":")
    if scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    return all(_is_loopback(address) for address in target.split(","))


def _is_loopback(address: str) -> bool:
    # A host may be an IPv6 address, which has colons of its own, and then stands in brackets.
    host = address.rpartition("]")[0].removeprefix("[") or address.partition(":")[0]
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def _reader(token: Token) -> Callable[[], str]:
    if isinstance(token, str):
        return lambda: token
    return _TokenFile(token) if isinstance(token, Path) else token


class _TokenFile:
    """The token in a file, which others exchange from time to time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = path.read_text(encoding="ascii").strip()
        self._stamp = _stamp(path)

    def __call__(self) -> str:
        # While it is being exchanged there may be no file, or an empty one: the old one serves.
        with suppress(OSError, UnicodeDecodeError):
            stamp = _stamp(self._path)
            if stamp != self._stamp and (new := self._path.read_text(encoding="ascii").strip()):
                self._token, self._stamp = new, stamp
        return self._token


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return by what a change of the file is noticed."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
