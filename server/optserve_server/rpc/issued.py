"""Tokens that an identity provider issues: JSON Web Tokens, checked with its published keys.

Needs PyJWT: ``pip install "optserve-server[jwt]"``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import jwt
from jwt.utils import base64url_decode

from optserve_server.core.errors import UnauthenticatedError
from optserve_server.core.tenant import is_tenant
from optserve_server.rpc.access import not_accepted
from optserve_server.rpc.caller import Caller
from optserve_server.rpc.watched import UnusableFileError, Watched

_LOGGER = logging.getLogger(__name__)

# Signatures by key pairs only. With a shared secret whoever can check a token can make one; and a
# public key that is taken for such a secret is known to everybody.
ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
_LIFESPAN_S = 300.0  # So long a key that the issuer has taken back is still trusted.
_COOLDOWN_S = 10.0  # Or whoever invents names of keys has us ask the issuer all the time.
_TIMEOUT_S = 5.0
_HEADER_PARTS_MAX = 32  # Objects and lists; PyJWT goes as deep as a stranger likes.


class Keys(Protocol):
    """The issuer's public keys."""

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return the key of this name, or the only one if a token names none; None: no such key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedTokens:
    """Knows whose a token is that the issuer has signed."""

    keys: Keys
    issuer: str
    """What `iss` must be."""
    audience: str
    """What `aud` must be, or hold: a token for another service is none for this one."""
    claim: str
    """The claim that names the tenant."""
    leeway_s: float
    """How far the issuer's clock may be from ours."""

    async def caller(self, token: str) -> Caller:
        """Return whose a token is, until it expires.

        Raises:
            UnauthenticatedError: It is nobody's. What it is raised from says why, for the log.
        """
        try:
            _check_shallow(token)
            key = await self.keys.find(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                raise jwt.InvalidKeyError("the issuer has no such key")
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self.issuer,
                audience=self.audience,
                leeway=self.leeway_s,
                options={"require": ["exp", "iss", "aud", self.claim]},
            )
            tenant = claims[self.claim]
            if not isinstance(tenant, str) or not is_tenant(tenant):
                raise jwt.InvalidTokenError("the claim names no tenant")
        except jwt.PyJWTError as error:
            raise not_accepted() from error
        expires_s = int(claims["exp"])

        def ended() -> str:
            # By the clock that every other look at a token goes by: it may be set meanwhile.
            if time.time() < expires_s + self.leeway_s:
                return ""
            return f"the token has expired at {datetime.fromtimestamp(expires_s, UTC).isoformat()}"

        return Caller(tenant=tenant, ended=ended)


def _check_shallow(token: str) -> None:
    """Make sure that a token's header, which nobody has signed, can be parsed on any stack.

    Raises:
        jwt.DecodeError: It cannot.
    """
    try:
        header = base64url_decode(token.partition(".")[0])
    except ValueError as error:
        raise jwt.DecodeError("the header is not base64") from error
    if header.count(b"[") + header.count(b"{") > _HEADER_PARTS_MAX:
        raise jwt.DecodeError("the header has too many parts")


class FileKeys:
    """Keys in a file, which may change."""

    def __init__(self, path: Path) -> None:
        """Read the file, a JSON Web Key Set.

        Raises:
            UnusableFileError: It cannot be read, or holds no key.
        """
        self._keys = Watched([path], lambda contents: _parsed(path, contents[0]))

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return a key; see Keys."""
        return _find(self._keys.current(), key_id)


class FetchedKeys:
    """Keys at a URL, fetched when one is asked for that is not known, and now and then."""

    def __init__(self, url: str) -> None:
        """Fetch nothing yet."""
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=_TIMEOUT_S)
        self._url = url
        self._keys: jwt.PyJWKSet | None = None
        self._fetched_s = self._tried_s = float("-inf")
        self._fetch: asyncio.Task[None] | None = None
        # Of its own: what computes need not wait for an issuer that does not answer.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jwks")

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return a key; see Keys.

        Raises:
            UnauthenticatedError: The keys could not be had so far.
        """
        found = _find(self._keys, key_id)
        if found is None:
            self._refresh()
            if self._fetch:  # Ours, or that of somebody who came before.
                await asyncio.shield(self._fetch)
            found = _find(self._keys, key_id)
        elif time.monotonic() - self._fetched_s > _LIFESPAN_S:
            self._refresh()  # For those who come later: nobody waits for what he has.
        if self._keys is None:
            raise UnauthenticatedError(
                "the token cannot be checked, for its issuer does not answer; try again later",
                retry_after_s=_COOLDOWN_S,
            )
        return found

    def _refresh(self) -> None:
        """Begin to fetch the keys, unless that is under way or was just tried."""
        if self._fetch is None and time.monotonic() - self._tried_s > _COOLDOWN_S:
            self._tried_s = time.monotonic()
            self._fetch = asyncio.create_task(self._fetch_keys())

    async def _fetch_keys(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._keys = await loop.run_in_executor(self._thread, self._client.get_jwk_set)
            self._fetched_s = time.monotonic()
        except (jwt.PyJWTError, OSError, ValueError) as error:
            _LOGGER.warning(
                "the issuer's keys cannot be fetched; those from before stay in force",
                extra={"url": self._url, "cause": str(error)},
            )
        finally:
            self._fetch = None


def keys_at(place: str) -> Keys:
    """Return the keys at a URL, or in a file.

    Raises:
        UnusableFileError: The file cannot be read, or holds no key.
    """
    return FetchedKeys(place) if "://" in place else FileKeys(Path(place))


def _parsed(path: Path, content: bytes) -> jwt.PyJWKSet:
    try:
        return jwt.PyJWKSet.from_json(content.decode())
    except (jwt.PyJWTError, ValueError, AttributeError) as error:
        raise UnusableFileError(f"{path} is no JSON Web Key Set: {error}") from error


def _find(keys: jwt.PyJWKSet | None, key_id: str | None) -> jwt.PyJWK | None:
    usable = [key for key in keys or () if key.public_key_use in (None, "sig")]
    if key_id is None:
        return usable[0] if len(usable) == 1 else None
    return next((key for key in usable if key.key_id == key_id), None)
