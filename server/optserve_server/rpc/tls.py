"""TLS: the server's certificate, those of its clients, and what happens when they are replaced."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from optserve_server.rpc.watched import UnusableFileError, Watched

Credentials = grpc.ServerCredentials
_Configuration = grpc.ServerCertificateConfiguration


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> Credentials:
    """Return credentials that follow the files.

    A connection keeps what it was made with; the next one is made with what the files say then.

    Args:
        certificate: PEM: the server's certificate, then those between it and the root.
        key: PEM: the certificate's key, not encrypted.
        client_ca: PEM: who may vouch for clients, of whom each must have a certificate then.
            None: no client is asked for one.

    Raises:
        UnusableFileError: A file cannot be read or used, or the key is another certificate's.
    """

    def parse(contents: tuple[bytes, ...]) -> _Configuration:
        _context(certificate, key, client_ca)  # gRPC would tell nobody but a client what is wrong.
        chain, private_key, *roots = contents
        return grpc.ssl_server_certificate_configuration(
            [(private_key, chain)], root_certificates=roots[0] if roots else None
        )

    files = Watched(_paths(certificate, key, client_ca), parse)
    in_force = files.current()

    def changed() -> _Configuration | None:  # On a thread of gRPC's, before every handshake.
        nonlocal in_force
        last, in_force = in_force, files.current()
        return None if in_force is last else in_force

    return grpc.dynamic_ssl_server_credentials(
        in_force,
        changed,  # type: ignore[arg-type] # None: no change.
        require_client_authentication=client_ca is not None,
    )


def https_context(
    certificate: Path, key: Path, client_ca: Path | None
) -> Callable[[], ssl.SSLContext]:
    """Return what tells with which context to make an HTTPS connection; it follows the files.

    Args and errors are those of server_credentials.
    """
    files = Watched(
        _paths(certificate, key, client_ca), lambda _: _context(certificate, key, client_ca)
    )
    return files.current


def _paths(certificate: Path, key: Path, client_ca: Path | None) -> list[Path]:
    return [certificate, key] if client_ca is None else [certificate, key, client_ca]


def _context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Return what the files say together.

    Raises:
        UnusableFileError: They do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors.
        raise UnusableFileError(f"{certificate} and {key} do not fit: {error}") from error
    try:
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise UnusableFileError(f"{client_ca} holds no certificates: {error}") from error
    return context


def _no_password() -> str:
    """Refuse what OpenSSL would otherwise ask for on the terminal."""
    raise ValueError("the key is encrypted")
