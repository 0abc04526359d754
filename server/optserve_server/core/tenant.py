"""Whose sessions they are: what one tenant can see and touch of a registry."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optserve_server.core.actor import SessionActor
    from optserve_server.core.beginning import Beginning
    from optserve_server.core.checkpoints import Opened, Saved
    from optserve_server.core.creations import CreationRequest
    from optserve_server.core.registry import SessionRegistry
from optserve_server.core.standing import Listed

DEFAULT_TENANT = ""
"""Whose sessions they are where nobody is asked who they are."""

TENANT_BYTES_MAX = 256  # An address or a URI; it stands in logs, and beside each session.


def is_tenant(name: object) -> bool:
    """Return whether ``name`` can be that of somebody who was asked."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= TENANT_BYTES_MAX
        and name.isprintable()
    )


def named(tenant: str) -> str:
    """Return what to call a tenant in a message."""
    return f"tenant {tenant!r}" if tenant else "the only tenant"


class TenantRegistry:
    """The registry as one tenant has it: what is somebody else's is not there.

    Calls are given this and not the registry, so that none can forget to ask whose a session is.
    """

    def __init__(self, registry: SessionRegistry, tenant: str) -> None:
        """Show ``tenant`` its part of ``registry``."""
        self._registry = registry
        self.tenant = tenant
        self.limits = registry.limits
        self.surroundings = registry.surroundings
        self.budget = registry.quotas.of(tenant)
        self.creations = registry.creations
        self._checkpoints = registry.checkpoints

    def check_accepting(self) -> None:
        """Make sure that new work may begin; see SessionRegistry.check_accepting."""
        self._registry.check_accepting()

    async def create(
        self, beginning: Beginning, request: CreationRequest | None = None
    ) -> SessionActor:
        """Create a session of this tenant; see SessionRegistry.create."""
        return await self._registry.create(self.tenant, beginning, request)

    async def find(self, session_id: str) -> SessionActor:
        """Return a session of this tenant; see SessionRegistry.find."""
        return await self._registry.find(self.tenant, session_id)

    async def page(self, *, after: int, count: int) -> tuple[Sequence[Listed], int | None]:
        """Return some sessions of this tenant; see SessionRegistry.page."""
        return await self._registry.page(self.tenant, after=after, count=count)

    def resized(self, actor: SessionActor, count: int) -> AbstractContextManager[None]:
        """Reserve what a session of this tenant will need; see SessionRegistry.resized."""
        return self._registry.resized(actor, count)

    async def delete(self, session_id: str) -> Listed:
        """Forget a session of this tenant; see SessionRegistry.delete."""
        return await self._registry.delete(self.tenant, session_id)

    async def save_checkpoint(self, actor: SessionActor, name: str) -> Saved:
        """Save a session of this tenant; see Checkpoints.save."""
        return await self._checkpoints.save(actor, name)

    async def checkpoint_page(
        self, session_id: str, *, after: int, count: int
    ) -> tuple[Sequence[Saved], int | None]:
        """Return some checkpoints of this tenant; see Checkpoints.page."""
        return await self._checkpoints.page(self.tenant, session_id, after=after, count=count)

    def opened_checkpoint(self, session_id: str, name: str) -> AbstractAsyncContextManager[Opened]:
        """Have a checkpoint of this tenant in memory; see Checkpoints.opened."""
        return self._checkpoints.opened(self.tenant, session_id, name)

    async def delete_checkpoint(self, session_id: str, name: str) -> Saved:
        """Delete a checkpoint of this tenant; see Checkpoints.delete."""
        return await self._checkpoints.delete(self.tenant, session_id, name)
