"""Rules about servers and strangers: what ends them, and what stays closed to them."""

from __future__ import annotations

from faults.machines.modelled.ground import ANY, Ground
from faults.machines.modelled.service import TENANTS, look
from faults.machines.modelled.session import OPTIMIZERS
from faults.machines.modelled.world import LIMITS
from faults.strangers import call, request_for
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.rpc.server import SERVICE

_NOBODYS = "0" * 32
NAMING = st.sampled_from(
    [
        each
        for each in SERVICE.methods
        if _NOBODYS.encode() in request_for(each.input_type, _NOBODYS).SerializeToString()
    ]
)
"""Methods whose requests name a session."""


class Ends(Ground):
    """Servers that come and go, sessions that are parked, tenants that try."""

    @rule(how=st.sampled_from(["park", "park", "stop", "kill"]))
    @precondition(lambda self: self.world.sessions)
    def take_out_of_memory(self, how: str) -> None:
        """Park what nobody uses; or end the server, as SIGTERM or kill -9 does, for another one."""
        if how == "park":
            self._park()
            return
        for seat in self.seats.values():
            seat.leave()
        self.seats.clear()
        if how == "stop":
            self.service.stop()
            self._begin_anew()
        else:
            self._kill()
        self._ask_what_there_is()

    @rule(number=ANY, method=NAMING)
    @precondition(lambda self: self.world.sessions)
    def be_somebody_else(self, number: int, method: MethodDescriptor) -> None:
        tenant, session_id = self.any_session(number)
        (other,) = set(TENANTS) - {tenant}
        answers = [self._try(other, method, each) for each in (session_id, _NOBODYS)]
        assert answers[0] == answers[1]

    def _park(self) -> None:
        in_use = {session_id for session_id, _ in self.seats}
        idle = {
            session_id
            for session_id, owned in self.world.sessions.items()
            if owned.session.wanted.is_durable and not (owned.parked or owned.session.round)
        }
        assert set(self.service.park()) == idle - in_use
        for session_id in idle - in_use:
            self.world.sessions[session_id].parked = True

    def _ask_what_there_is(self) -> None:
        stub = self.driver(TENANTS[0]).stub
        limits = stub.GetServerInfo(pb.GetServerInfoRequest()).limits
        for field in ("sessions_max", "tenant_sessions_max", "checkpoints_max"):
            assert getattr(limits, field) == getattr(LIMITS, field)
        catalogue = stub.GetCatalogue(pb.GetCatalogueRequest())
        assert OPTIMIZERS.keys() <= {each.name for each in catalogue.optimizers}

    def _kill(self) -> None:
        """Have the server killed; what is not in a snapshot may be gone then, and no more."""
        safe = {
            session_id: self.driver(owned.tenant).get(session_id).status.durable_steps
            for session_id, owned in self.world.sessions.items()
            if owned.session.wanted.takes_snapshots
        }
        self.service.kill()
        self._begin_anew()
        for session_id, steps in safe.items():
            self._go_back(session_id, steps)
        for owned in self.world.sessions.values():
            owned.stale = owned.parked

    def _begin_anew(self) -> None:
        """Have what a server finds that has just begun."""
        for session_id, owned in list(self.world.sessions.items()):
            if not owned.session.wanted.is_durable:
                self.world.forget(session_id)
            owned.parked = True
            owned.session.round.clear()

    def _go_back(self, session_id: str, durable_steps: int) -> None:
        """Find out what a crash has left of a session, which is something that it was."""
        owned = self.world.find(self.world.sessions[session_id].tenant, session_id)
        seen = look(self.driver(owned.tenant), session_id)
        assert seen.steps >= durable_steps
        while owned.session.view() != seen:
            assert owned.past, f"the session has never been {seen}"
            owned.session = owned.past.pop()

    def _try(self, tenant: str, method: MethodDescriptor, session_id: str) -> tuple[str, ...]:
        """Call a method about a session; return how it is answered, but for the session's id."""
        request = request_for(method.input_type, session_id)
        if "name" in request.DESCRIPTOR.fields_by_name:
            request.name = "best"  # type: ignore[attr-defined] # It has: see above.
        try:
            answer: Message = call(self.service.channels[tenant], method, request)
        except RefusedError as error:
            facts = (error.code.name, error.reason, error.field, error.expected, error.actual)
            return tuple(fact.replace(session_id, "it") for fact in (*facts, error.message))
        return (str(answer).replace(session_id, "it"),)
