"""Whose call it is: by a token, by a certificate, or nobody asks."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from optserve_server.core.errors import UnauthenticatedError
from optserve_server.core.tenant import DEFAULT_TENANT, is_tenant
from optserve_server.rpc.caller import Caller
from optserve_server.rpc.tokens import Tokens

_Context = grpc.aio.ServicerContext[Any, Any]

_LOGGER = logging.getLogger(__name__)
_HEADER = "authorization"
_SCHEME = "bearer"
_EXPECTED = "authorization: Bearer TOKEN"
_COMPLAINT_INTERVAL_S = 10.0

# Who calls, for the rest of the call: a call is a task of its own, from the interceptors to its
# end. There is no default: what was not asked is served nothing.
_TENANT: ContextVar[str] = ContextVar("tenant")


def tenant() -> str:
    """Return whose call this is.

    Raises:
        LookupError: Nobody has asked.
    """
    return _TENANT.get()


class Issuer(Protocol):
    """Knows whose the tokens are that somebody else has issued."""

    async def caller(self, token: str) -> Caller:
        """Return whose a token is.

        Raises:
            UnauthenticatedError: It is nobody's.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A call that was let in."""

    caller: Caller
    access: Access
    context: _Context

    def check(self) -> None:
        """Make sure that what was shown when the call began is accepted still.

        Raises:
            UnauthenticatedError: It is not. Whoever has something else to show may come again.
        """
        if ended := self.caller.ended():
            error = UnauthenticatedError(
                f"{ended}: call again, with one that is accepted",
                expected="a token that is accepted",
                retry_after_s=0.0,
            )
            self.access.complain(error, self.context.peer())
            raise error


class Answering:
    """What a call that was let in answers by, message for message: its context, as far as that."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def write(self, message: Any) -> None:  # noqa: ANN401 - A message, or chunks of one.
        """Send a message.

        Raises:
            UnauthenticatedError: As of Admission.check.
        """
        self._admission.check()
        await self._admission.context.write(message)


class Access:
    """Asks callers who they are. Without anything to ask for, all are the default tenant."""

    def __init__(
        self,
        *,
        tokens: Tokens | None = None,
        issuer: Issuer | None = None,
        certificates: bool = False,
    ) -> None:
        """Ask for what there is.

        Args:
            tokens: Those that this server's operator has given out.
            issuer: Knows those that an identity provider issues.
            certificates: Whether every client has shown a certificate; where there are no tokens,
                it says who calls.
        """
        self._tokens = tokens
        self._issuer = issuer
        self._certificates = certificates
        self._complained_s = float("-inf")
        self._unsaid = 0

    async def admit(self, context: _Context) -> Admission:
        """Find out whose call it is, once for all of it.

        Raises:
            UnauthenticatedError: The caller does not show who it is.
        """
        try:
            caller = await self._find(context)
        except UnauthenticatedError as error:
            self.complain(error, context.peer())
            raise
        _TENANT.set(caller.tenant)
        return Admission(caller=caller, access=self, context=context)

    async def _find(self, context: _Context) -> Caller:
        if self._tokens is None and self._issuer is None:
            return Caller(tenant=_certified(context) if self._certificates else DEFAULT_TENANT)
        token = _token(context)
        found = self._tokens.caller(token) if self._tokens else None
        if found is None and self._issuer:
            found = await self._issuer.caller(token)
        if found is None:
            raise not_accepted()
        return found

    def complain(self, error: UnauthenticatedError, peer: str) -> None:
        """Log a refusal, but not each one of somebody who tries many."""
        now = time.monotonic()
        if now - self._complained_s < _COMPLAINT_INTERVAL_S:
            self._unsaid += 1
            return
        # Of what it was raised from only the kind: its text may quote what came.
        cause = type(error.__cause__).__name__ if error.__cause__ else error.message
        _LOGGER.warning(
            "a caller does not show who it is",
            extra={"peer": peer, "cause": cause, "others_since_last": self._unsaid},
        )
        self._complained_s, self._unsaid = now, 0


def not_accepted() -> UnauthenticatedError:
    """Return what a token is refused with. It does not say what is wrong, which the log does."""
    return UnauthenticatedError(
        "the token is not accepted: it is unknown, has expired, or is for another server"
    )


def _token(context: _Context) -> str:
    """Return the token that a call carries."""
    values = [value for key, value in context.invocation_metadata() or () if key == _HEADER]
    if not values:
        raise UnauthenticatedError(
            "the server asks who calls, and the call carries no token", expected=_EXPECTED
        )
    if len(values) > 1:
        raise UnauthenticatedError("the call carries more than one token", expected="one token")
    scheme, _, token = str(values[0]).partition(" ")
    if scheme.lower() != _SCHEME or not token:
        raise UnauthenticatedError("the call carries no bearer token", expected=_EXPECTED)
    return token.strip()


def _certified(context: _Context) -> str:
    """Return whom the client's certificate names: its common name, or else its only other one."""
    facts = context.auth_context()
    names = list(filter(None, facts.get("x509_common_name", ())))
    names = names or list(facts.get("x509_subject_alternative_name", ()))
    name = names[0].decode(errors="replace") if len(names) == 1 else ""
    if not is_tenant(name):
        raise UnauthenticatedError(
            "the certificate names nobody",
            expected="a common name, or one subject alternative name",
        )
    return name
