"""Rules about checkpoints: saved, restored, downloaded, deleted."""

from __future__ import annotations

import safetensors.torch
from faults.machines.modelled.ground import ANY, OWNERS, REQUEST_IDS, Ground
from faults.machines.modelled.session import Session
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from messages import bytes_of

from optserve.v1 import optimizer_service_pb2 as pb

NAMES = st.sampled_from(["best", "last"])


class Checkpointing(Ground):
    """States under names, which outlive their sessions."""

    @rule(number=ANY, name=NAMES)
    @precondition(lambda self: self.world.sessions)
    def save(self, number: int, name: str) -> None:
        tenant, session_id = self.any_session(number)
        saved = self.agree(
            lambda: self.world.save(tenant, session_id, name),
            lambda: self.checkpoints(tenant).save(session_id, name),
        )
        if saved:
            kept, came = saved
            assert (came.session_id, came.name) == (session_id, name)
            assert (came.steps, came.epochs) == (kept.steps, kept.epochs)

    @rule(
        number=ANY,
        owner=OWNERS,
        request_id=REQUEST_IDS,
        display_name=st.sampled_from([None, None, "a fork"]),
    )
    @precondition(lambda self: self.world.any_checkpoint)
    def restore(self, number: int, owner: str, request_id: str, display_name: str | None) -> None:
        session_id, name = self._any_checkpoint(number, owner)
        request = pb.RestoreCheckpointRequest(
            session_id=session_id, name=name, request_id=request_id, display_name=display_name
        )

        def fresh() -> Session:
            session = self.world.saved(owner, session_id, name).kept()
            if display_name is not None:
                session.display_name = display_name
            return session

        self.make(owner, request, fresh)

    @rule(number=ANY, owner=OWNERS)
    @precondition(lambda self: self.world.any_checkpoint)
    def download(self, number: int, owner: str) -> None:
        session_id, name = self._any_checkpoint(number, owner)
        downloaded = self.agree(
            lambda: self.world.saved(owner, session_id, name),
            lambda: self.checkpoints(owner).download(session_id, name),
        )
        if downloaded:
            session, (begin, file) = downloaded
            assert len(file) == begin.byte_count
            assert {
                name.removeprefix("parameters/"): bytes_of(each)
                for name, each in safetensors.torch.load(file).items()
                if name.startswith("parameters/")
            } == {
                name: bytes_of(each)
                for name, each in session.values.items()
                if name not in session.unset
            }

    @rule(number=ANY, owner=OWNERS)
    @precondition(lambda self: self.world.any_checkpoint)
    def delete_a_checkpoint(self, number: int, owner: str) -> None:
        session_id, name = self._any_checkpoint(number, owner)
        deleted = self.agree(
            lambda: self.world.delete_checkpoint(owner, session_id, name),
            lambda: self.checkpoints(owner).delete(session_id, name),
        )
        if deleted:
            assert (deleted[1].name, deleted[1].steps) == (name, deleted[0].steps)

    def _any_checkpoint(self, number: int, owner: str) -> tuple[str, str]:
        """Return the session and the name of a checkpoint: the owner's, or else the other's."""
        own = self.world.checkpoints.get(owner, {})
        keys = list(own) or [key for saved in self.world.checkpoints.values() for key in saved]
        key = keys[number % len(keys)]
        return key.session_id, key.name
