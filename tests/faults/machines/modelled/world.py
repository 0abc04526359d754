"""What a server must be: dicts of sessions, of requests and of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from faults.machines.modelled.session import RefusalError, Session

from optserve.v1.optimizer_service_pb2 import CreateSessionRequest, RestoreCheckpointRequest
from optserve_server.core.limits import Limits

Request = CreateSessionRequest | RestoreCheckpointRequest
"""What makes a session."""

LIMITS = Limits(sessions_max=4, tenant_sessions_max=3, checkpoints_max=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a checkpoint is known by."""

    session_id: str
    name: str


@dataclass(slots=True, kw_only=True)
class Owned:
    """A session, and what the server says of it beside what it is."""

    tenant: str
    session: Session
    past: list[Session] = field(default_factory=list)
    """What it was, before and after each change: a crash may leave any of these."""
    parked: bool = False
    stale: bool = False
    """Whether the catalogue may tell of it as it was once: after a crash, until it is called."""


@dataclass(slots=True)
class World:
    """Everything that a server has."""

    sessions: dict[str, Owned] = field(default_factory=dict)
    """By id, the oldest first."""
    gone: list[tuple[str, str]] = field(default_factory=list)
    """Sessions that are no more, by tenant and id."""
    requests: dict[tuple[str, str], tuple[Request, str]] = field(default_factory=dict)
    """By tenant and id: what was asked, and the session that was made."""
    checkpoints: dict[str, dict[Key, Session]] = field(default_factory=dict)
    """By tenant, the oldest first."""

    @property
    def any_checkpoint(self) -> bool:
        """Whether anybody has a checkpoint."""
        return any(self.checkpoints.values())

    def find(self, tenant: str, session_id: str) -> Owned:
        """Return a tenant's session, which is in memory then."""
        owned = self.sessions.get(session_id)
        if owned is None or owned.tenant != tenant:
            raise RefusalError("SESSION_NOT_FOUND")
        owned.parked = owned.stale = False
        return owned

    def known(self, tenant: str, request: Request) -> str | None:
        """Return the session that a request has made already; None if it is to make one."""
        if (tenant, request.request_id) not in self.requests:
            return None
        first, session_id = self.requests[tenant, request.request_id]
        if request != first:
            raise RefusalError("REQUEST_CONFLICT")
        self.find(tenant, session_id)
        return session_id

    def check_room(self, tenant: str) -> None:
        """Make sure that a tenant may have one more session."""
        own = [owned for owned in self.sessions.values() if owned.tenant == tenant]
        if len(self.sessions) >= LIMITS.sessions_max or len(own) >= LIMITS.tenant_sessions_max:
            raise RefusalError("TOO_MANY")

    def delete(self, tenant: str, session_id: str) -> Session:
        """Forget a session, and the request that has made it."""
        owned = self.sessions.get(session_id)
        if owned is None or owned.tenant != tenant:
            raise RefusalError("SESSION_NOT_FOUND")
        self.forget(session_id)
        return owned.session

    def forget(self, session_id: str) -> None:
        """Let a session go."""
        self.gone.append((self.sessions.pop(session_id).tenant, session_id))
        for key in [key for key, (_, made) in self.requests.items() if made == session_id]:
            del self.requests[key]

    def save(self, tenant: str, session_id: str, name: str) -> Session:
        """Save a session under a name; return what is there then."""
        now = self.find(tenant, session_id).session
        own, key = self.checkpoints.setdefault(tenant, {}), Key(session_id=session_id, name=name)
        if key in own:
            if own[key].view() != now.kept().view() or own[key].changes != now.changes:
                raise RefusalError("CHECKPOINT_EXISTS")
            return own[key]
        if len(own) >= LIMITS.checkpoints_max:
            raise RefusalError("TOO_MANY")
        own[key] = now.kept()
        return own[key]

    def saved(self, tenant: str, session_id: str, name: str) -> Session:
        """Return what a checkpoint holds."""
        key = Key(session_id=session_id, name=name)
        if key not in self.checkpoints.get(tenant, {}):
            raise RefusalError("CHECKPOINT_NOT_FOUND")
        return self.checkpoints[tenant][key]

    def delete_checkpoint(self, tenant: str, session_id: str, name: str) -> Session:
        """Delete a checkpoint; return what it held."""
        was = self.saved(tenant, session_id, name)
        del self.checkpoints[tenant][Key(session_id=session_id, name=name)]
        return was
