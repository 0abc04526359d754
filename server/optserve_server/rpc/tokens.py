"""Tokens: whose they are, from a file that holds their hashes, and how to make one.

    python -m optserve_server.rpc.tokens alice >> tokens.toml

makes a token for the tenant alice, shows it once, on standard error, and appends what the server
must know of it. A token is 256 random bits, so that its hash can be published: nobody finds it by
trying, and it needs no salt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from optserve_server.core.tenant import TENANT_BYTES_MAX, is_tenant
from optserve_server.rpc.caller import Caller
from optserve_server.rpc.watched import UnusableFileError, Watched

__all__ = ["Tokens"]

TOKEN_BYTES = 32
_PREFIX = "optserve_"  # So that scanners for leaked secrets find them.
_EXPECTED = "[[token]] tables, each with `tenant` and `sha256`"


class Tokens:
    """Knows whose a token is, from a file that may change."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UnusableFileError: It cannot be read, or does not hold tokens.
        """
        self._tenants = Watched([path], lambda contents: _parsed(path, contents[0]))

    def caller(self, token: str) -> Caller | None:
        """Return whose a token is, for as long as the file says so; None if it is nobody's."""
        # What is looked for is a hash. How long that takes says nothing that helps to guess a
        # token: who tries one cannot tell which hash it will have.
        digest = _hash(token)
        tenant = self._tenants.current().get(digest)
        if tenant is None:
            return None

        def ended() -> str:
            held = self._tenants.current().get(digest) == tenant
            return "" if held else "the token was taken back in the middle of the call"

        return Caller(tenant=tenant, ended=ended)


def made(tenant: str) -> tuple[str, str]:
    """Make a token; return it, and what the file must hold of it.

    Raises:
        ValueError: The tenant's name is none.
    """
    if not is_tenant(tenant):
        raise ValueError(f"a tenant's name has 1 to {TENANT_BYTES_MAX} printable bytes")
    token = _PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    # A string of JSON, without what is beyond ASCII, is one of TOML.
    entry = f'[[token]]\ntenant = {json.dumps(tenant)}\nsha256 = "{_hash(token).hex()}"\n'
    return token, entry


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _parsed(path: Path, content: bytes) -> Mapping[bytes, str]:
    """Return whose the tokens are, by their hashes."""
    try:
        tables = tomllib.loads(content.decode())
        _check_only(tables, {"token"})
        entries = [(_sha256(entry), _tenant(entry)) for entry in tables.get("token", [])]
        return _once(entries)
    except (ValueError, TypeError, LookupError) as error:
        raise UnusableFileError(f"{path} does not hold {_EXPECTED}: {error}") from error


def _once(entries: Sequence[tuple[bytes, str]]) -> Mapping[bytes, str]:
    """Return the entries by their hashes, of which each stands there once."""
    tenants = dict(entries)
    if len(tenants) < len(entries):
        raise ValueError("a `sha256` stands there twice")
    return tenants


def _check_only(table: Mapping[str, object], known: Collection[str]) -> None:
    """Make sure that nothing is in a table that would have no effect."""
    for name in table:
        if name not in known:
            raise ValueError(f"{name!r} means nothing here")


def _tenant(entry: Mapping[str, object]) -> str:
    _check_only(entry, {"tenant", "sha256"})
    tenant = entry["tenant"]
    if not isinstance(tenant, str) or not is_tenant(tenant):
        raise ValueError(f"a tenant's name has 1 to {TENANT_BYTES_MAX} printable bytes")
    return tenant


def _sha256(entry: Mapping[str, object]) -> bytes:
    digest = bytes.fromhex(str(entry["sha256"]))
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError("a `sha256` has other than 64 hexadecimal digits")
    return digest


def main(arguments: list[str]) -> int | str:
    """Make a token for a tenant; return the exit code, or what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m optserve_server.rpc.tokens",
        description="Make a token: it is shown on standard error, its entry on standard output.",
    )
    parser.add_argument("tenant", help="whose the token is to be")
    try:
        token, entry = made(parser.parse_args(arguments).tenant)
    except ValueError as error:
        return str(error)
    sys.stderr.write(f"the token, which is shown once: {token}\n")
    sys.stdout.write(entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
