"""What all rules have in common: the model, the server, and how both are asked the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import ClassVar, TypeVar

from event_loop import TIMEOUT_S
from faults.checkpointing import Checkpoints
from faults.machines.modelled.seat import Seat
from faults.machines.modelled.service import TENANTS, Service, look, rates_of
from faults.machines.modelled.session import RefusalError, Session
from faults.machines.modelled.world import Owned, Request, World
from faults.strangers import ChannelDriver
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from paging import pages
from refusals import refused, translated

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.session_pb2 import SessionState, SessionStatus

_T = TypeVar("_T")
_M = TypeVar("_M")

ANY = st.integers(0, 11)
"""Chooses one of what there is, however many there are."""
OWNERS = st.sampled_from(TENANTS)
REQUEST_IDS = st.sampled_from(["", "", "one", "two"])


class Ground(RuleBasedStateMachine):
    """A server, and what it must be like."""

    calls: ClassVar[Counter[str]] = Counter()
    """Of owners, by their methods, over all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.service = Service(self.calls)
        self.seats: dict[tuple[str, int], Seat] = {}
        """By session and worker."""

    def agree(self, modelled: Callable[[], _M], real: Callable[[], _T]) -> tuple[_M, _T] | None:
        """Have the model and the server do the same; None if both refuse, for the same reason."""
        try:
            expected = modelled()
        except RefusalError as refusal:
            with refused(refusal.reason):
                real()
            return None
        return expected, real()

    def any_session(self, number: int) -> tuple[str, str]:
        """Return the tenant and the id of a session, now and then of one that is no more."""
        there = [(owned.tenant, each) for each, owned in self.world.sessions.items()]
        known = [*there, *there, *self.world.gone[-1:]]
        return known[number % len(known)]

    def driver(self, tenant: str) -> ChannelDriver:
        """Return what makes a tenant's calls."""
        return self.service.drivers[tenant]

    def checkpoints(self, tenant: str) -> Checkpoints:
        """Return what makes a tenant's calls about checkpoints."""
        return Checkpoints(self.driver(tenant))

    def changing(self, owned: Owned, change: Callable[[], _M]) -> _M:
        """Change a session of the model; what it was is kept, if a crash may bring it back."""
        before = owned.session.kept() if owned.session.wanted.takes_snapshots else None
        try:
            return change()
        finally:
            if before and owned.session.changes != before.changes:
                owned.past.append(before)

    def make(self, tenant: str, request: Request, fresh: Callable[[], Session]) -> None:
        """Ask for a session.

        Args:
            tenant: Who asks.
            request: For what.
            fresh: Returns the new session, if there is to be one.
        """

        def modelled() -> Session | None:
            if self.world.known(tenant, request):
                return None
            session = fresh()
            self.world.check_room(tenant)
            return session

        made = self.agree(modelled, lambda: self._make(tenant, request))
        if made is None:
            return
        session, status = made
        if session is not None:
            assert status.session_id not in self.world.sessions
            self.world.sessions[status.session_id] = Owned(tenant=tenant, session=session)
        if session is not None and request.request_id:
            self.world.requests[tenant, request.request_id] = request, status.session_id
        assert self.world.known(tenant, request) in (None, status.session_id)
        self.check_status(status, self.world.sessions[status.session_id])

    def check_status(self, status: SessionStatus, owned: Owned) -> None:
        """Look whether a session stands where it must."""
        session, wanted = owned.session, owned.session.wanted
        view = session.view()
        assert status.state == (SessionState.SESSION_STATE_PARKED if owned.parked else view.state)
        assert (status.optimizer, status.workers) == (wanted.optimizer, wanted.workers)
        assert status.parameter_count == sum(each.numel() for each in session.values.values())
        if owned.stale:
            return
        assert (status.steps, status.epochs) == (view.steps, view.epochs)
        assert status.display_name == view.display_name
        assert rates_of(status) == view.rates
        assert status.HasField("step_time") == bool(view.steps)
        risk = status.steps - status.durable_steps
        if wanted.journals:
            assert risk == 0
        elif wanted.takes_snapshots:
            assert 0 <= risk <= wanted.durability.snapshot_steps
        else:
            assert status.durable_steps == 0

    def check_session(self, session_id: str) -> None:
        """Look whether all that can be seen of a session is what it must be."""
        owned = self.world.sessions[session_id]
        self.world.find(owned.tenant, session_id)
        seen = look(self.driver(owned.tenant), session_id)
        wanted = owned.session.view()
        assert seen == wanted, f"seen: {seen}; and must be: {wanted}"

    @invariant()
    def lists_are_what_they_must_be(self) -> None:
        for tenant in TENANTS:
            own = {
                session_id: owned
                for session_id, owned in self.world.sessions.items()
                if owned.tenant == tenant
            }
            listed = self._sessions(tenant)
            assert [each.session_id for each in listed] == list(own)
            for status, owned in zip(listed, own.values(), strict=True):
                self.check_status(status, owned)
            saved = self.world.checkpoints.get(tenant, {})
            found = self._checkpoints(tenant)
            assert [(each.session_id, each.name) for each in found] == [
                (key.session_id, key.name) for key in saved
            ]
            for each, session in zip(found, saved.values(), strict=True):
                assert (each.steps, each.epochs) == (session.steps, session.epochs)

    def teardown(self) -> None:
        try:
            for session_id in self.world.sessions:
                self.check_session(session_id)
            for session_id, owned in self.world.sessions.items():
                self.driver(owned.tenant).delete(session_id)
            assert self.service.reserved_bytes == 0, "memory is reserved for nobody"
        finally:
            for seat in self.seats.values():
                seat.leave()
            self.service.close()

    def _make(self, tenant: str, request: Request) -> SessionStatus:
        stub = self.driver(tenant).stub
        with translated():
            if isinstance(request, pb.CreateSessionRequest):
                return stub.CreateSession(request, timeout=TIMEOUT_S).session.status
            return stub.RestoreCheckpoint(request, timeout=TIMEOUT_S).session.status

    def _sessions(self, tenant: str) -> list[SessionStatus]:
        """Return a tenant's sessions, listed in pages of two."""
        driver = self.driver(tenant)
        found = pages(lambda token: driver.sessions(page_size=2, page_token=token))
        return [each for page in found for each in page.sessions]

    def _checkpoints(self, tenant: str) -> list[Checkpoint]:
        """Return a tenant's checkpoints, listed in pages of two."""
        checkpoints = self.checkpoints(tenant)
        found = pages(lambda token: checkpoints.page(page_size=2, page_token=token))
        return [each for page in found for each in page.checkpoints]
