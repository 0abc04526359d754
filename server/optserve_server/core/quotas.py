"""Quotas: how many sessions, how much memory and how much of the disk a tenant may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from optserve_server.core.admission import Budget
from optserve_server.core.disk_quotas import DiskQuotas
from optserve_server.core.errors import MemoryExhaustedError, TooManyError
from optserve_server.core.limits import Limits
from optserve_server.core.tenant import named

_RETRY_AFTER_S = 5.0  # As of Budget: it takes somebody who deletes something.


@dataclass(slots=True)
class _Use:
    sessions: int = 0
    reserved_bytes: int = 0


class Quotas:
    """What each tenant has. One that has nothing is forgotten."""

    def __init__(self, limits: Limits, budget: Budget) -> None:
        """Give each tenant at most what ``limits`` allow, 0 is no quota, and ``budget`` has."""
        self._limits = limits
        self._budget = budget
        self.disk = DiskQuotas(limits)
        self._uses: dict[str, _Use] = {}

    def open(self, tenant: str) -> None:
        """Count a session of a tenant, until close().

        Raises:
            TooManyError: The tenant has as many as it may.
        """
        use, most = self._uses.get(tenant, _Use()), self._limits.tenant_sessions_max
        if most and use.sessions >= most:
            raise TooManyError(
                f"{named(tenant)} has {use.sessions} sessions of {most}; delete some",
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

    def of(self, tenant: str) -> TenantBudget:
        """Return what a tenant reserves memory from."""
        return TenantBudget(self, tenant)

    def reserve(self, tenant: str, count: int, *, what: str, field: str) -> None:
        """Promise memory to a tenant, until release(); arguments as of Budget.reserve.

        Raises:
            MemoryExhaustedError: It would be more than the tenant may have, or than is left.
        """
        use, most = self._uses.get(tenant, _Use()), self._limits.tenant_bytes_max
        if most and use.reserved_bytes + count > most:
            raise MemoryExhaustedError(
                f"{what} needs {count} bytes; {named(tenant)} has {use.reserved_bytes} of {most};"
                " delete sessions that are done, or try again later",
                field=field,
                expected=f"at most {max(0, most - use.reserved_bytes)} bytes",
                actual=f"{count} bytes",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._budget.reserve(count, what=what, field=field)
        use.reserved_bytes += count
        self._uses[tenant] = use

    def release(self, tenant: str, count: int) -> None:
        """Give back what was promised to a tenant."""
        if count:
            self._budget.release(count)
            self._uses[tenant].reserved_bytes -= count
            self._forget(tenant)

    def _forget(self, tenant: str) -> None:
        if self._uses[tenant] == _Use():
            del self._uses[tenant]


class TenantBudget:
    """The memory as one tenant has it: what it reserves is its own, and of all."""

    def __init__(self, quotas: Quotas, tenant: str) -> None:
        """Reserve for ``tenant``, within its quota of ``quotas``."""
        self._quotas = quotas
        self._tenant = tenant

    def reserve(self, count: int, *, what: str, field: str) -> None:
        """Promise memory, until release(); arguments and errors as of Quotas.reserve."""
        self._quotas.reserve(self._tenant, count, what=what, field=field)

    def release(self, count: int) -> None:
        """Give back what was promised."""
        self._quotas.release(self._tenant, count)

    @contextmanager
    def reserved(self, count: int, *, what: str, field: str) -> Iterator[None]:
        """Promise memory for the time of a block. Raises as reserve()."""
        self.reserve(count, what=what, field=field)
        try:
            yield
        finally:
            self.release(count)
