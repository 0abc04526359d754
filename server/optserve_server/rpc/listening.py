"""Where the server listens: a port, or a Unix socket; with TLS, or without."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc

UNIX = "unix:"
"""What a host begins with that is a Unix socket; its path follows."""

_NOT_OURS = 0o177  # Of a new file's permissions, those that are taken away: 0600 stays.


class AddressInUseError(Exception):
    """The address cannot be bound; the message says which."""


def listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> str:
    """Bind a server that has not started; return its address, with the port that it got.

    Args:
        server: What is to listen.
        host: Address or name of the host, or ``unix:`` and the path of a socket, which nobody but
            the server's user will be able to open.
        port: 0 takes a free one. Of no meaning for a socket.
        credentials: None: whoever is between reads and changes what passes.

    Raises:
        AddressInUseError: The address cannot be bound.
    """
    if host.startswith(UNIX):
        with _only_ours(host.removeprefix(UNIX)):
            _bind(server, host, credentials)
        return host
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{_bind(server, f'{host}:{port}', credentials)}"


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressInUseError(
            f"cannot listen on {address}: another server may be there"
        ) from error


@contextmanager
def _only_ours(path: str) -> Iterator[None]:
    """Let sockets be made that are this user's alone, and not in the place of one in use."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.connect(path)  # gRPC would take its place.
        raise AddressInUseError(f"cannot listen on {UNIX}{path}: another server is there")
    before = os.umask(_NOT_OURS)
    try:
        yield
    finally:
        os.umask(before)
