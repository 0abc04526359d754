"""Quotas: how many sessions, and how much of the memory, a tenant has and may have."""

from __future__ import annotations

from dataclasses import dataclass

from optserve_server.core.errors import MemoryExhaustedError, TooManyError
from optserve_server.core.limits import Limits

_RETRY_AFTER_S = 5.0  # As of Budget: it takes somebody who deletes something.


@dataclass(slots=True)
class _Use:
    sessions: int = 0
    reserved_bytes: int = 0


class Quotas:
    """What each tenant has. One that has nothing is forgotten."""

    def __init__(self, limits: Limits) -> None:
        """Give each tenant at most what ``limits`` allow; 0 is no quota."""
        self._limits = limits
        self._uses: dict[str, _Use] = {}

    def open(self, tenant: str) -> None:
        """Count a session of a tenant, until close().

        Raises:
            TooManyError: The tenant has as many as it may.
        """
        use, most = self._uses.get(tenant, _Use()), self._limits.tenant_sessions_max
        if most and use.sessions >= most:
            raise TooManyError(
                f"{_named(tenant)} has {use.sessions} sessions of {most}; delete some",
                expected=f"at most {most} sessions",
                actual=f"{use.sessions + 1} sessions",
                retry_after_s=_RETRY_AFTER_S,
            )
        use.sessions += 1
        self._uses[tenant] = use

    def adopt(self, tenant: str) -> None:
        """Count a session that is there already, however many a tenant may have."""
        use = self._uses.setdefault(tenant, _Use())
        use.sessions += 1

    def close(self, tenant: str) -> None:
        """Count a session of a tenant no longer."""
        self._uses[tenant].sessions -= 1
        self._forget(tenant)

    def reserve(self, tenant: str, count: int, *, what: str, field: str) -> None:
        """Count memory of a tenant, until release(); arguments as of Budget.reserve.

        Raises:
            MemoryExhaustedError: It would be more than the tenant may have.
        """
        use, most = self._uses.get(tenant, _Use()), self._limits.tenant_bytes_max
        if most and use.reserved_bytes + count > most:
            raise MemoryExhaustedError(
                f"{what} needs {count} bytes; {_named(tenant)} has {use.reserved_bytes} of {most};"
                " delete sessions that are done",
                field=field,
                expected=f"at most {max(0, most - use.reserved_bytes)} bytes",
                actual=f"{count} bytes",
                retry_after_s=_RETRY_AFTER_S,
            )
        use.reserved_bytes += count
        self._uses[tenant] = use

    def release(self, tenant: str, count: int) -> None:
        """Count memory of a tenant no longer."""
        if count:
            self._uses[tenant].reserved_bytes -= count
            self._forget(tenant)

    def _forget(self, tenant: str) -> None:
        if self._uses[tenant] == _Use():
            del self._uses[tenant]


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "the only tenant"
