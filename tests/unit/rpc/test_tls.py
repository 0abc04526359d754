"""Certificates are taken when they fit, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority, ServerFiles
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from optserve_server.rpc.tls import Credentials, server_credentials
from optserve_server.rpc.watched import UnusableFileError


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> ServerFiles:
    return ServerFiles.of(tmp_path, authority.server())


def test_what_fits_is_taken(authority: Authority, files: ServerFiles, tmp_path: Path) -> None:
    roots = tmp_path / "clients.pem"
    roots.write_bytes(authority.root)
    for client_ca in (None, roots):
        credentials = server_credentials(files.certificate, files.key, client_ca)
        assert isinstance(credentials, Credentials)


def test_a_file_that_is_not_there_is_named(files: ServerFiles) -> None:
    files.key.unlink()
    with pytest.raises(UnusableFileError, match=r"server\.key cannot be read: No such file"):
        server_credentials(files.certificate, files.key, None)


def test_another_certificate_s_key_is_refused(authority: Authority, files: ServerFiles) -> None:
    files.key.write_bytes(authority.server().key)
    with pytest.raises(UnusableFileError, match="do not fit"):
        server_credentials(files.certificate, files.key, None)


def test_a_key_with_a_password_is_refused_and_not_asked_for(files: ServerFiles) -> None:
    key = load_pem_private_key(files.key.read_bytes(), None)
    hidden = BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
    with pytest.raises(UnusableFileError, match="the key is encrypted"):
        server_credentials(files.certificate, files.key, None)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nno\n"], ids=len)
def test_what_holds_no_certificate_is_refused(
    content: bytes, files: ServerFiles, tmp_path: Path
) -> None:
    roots = tmp_path / "clients.pem"
    roots.write_bytes(content)
    with pytest.raises(UnusableFileError, match="holds no certificates"):
        server_credentials(files.certificate, files.key, roots)
    files.certificate.write_bytes(content)
    with pytest.raises(UnusableFileError, match="do not fit"):
        server_credentials(files.certificate, files.key, None)
