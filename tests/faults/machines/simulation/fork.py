"""A session that goes on from a checkpoint, when the one that was saved is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from faults.machines.history import Course, RateChange, hash_of, trajectory
from faults.machines.simulation.caller import Caller
from faults.machines.simulation.operator import NAME, Saved
from faults.machines.simulation.scene import Scene
from faults.machines.simulation.steps import request_of
from messages import tensors_of
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb

_DIGEST_BYTES = 8


class Fork:
    """Restores a checkpoint, and looks whether it is what was saved."""

    def __init__(self, scene: Scene, saved: Saved) -> None:
        self._scene = scene
        self._saved = saved
        self._random = scene.random("fork")
        self._caller = Caller(scene, self._random)
        self.session_id = ""

    async def train(self, course: Course, changes: Sequence[RateChange]) -> None:
        """Restore it once, take a step, and delete the checkpoint.

        Args:
            course: Of the session that was saved.
            changes: Of its rate.
        """
        request = pb.RestoreCheckpointRequest(
            session_id=self._saved.session_id, name=NAME, request_id="the fork"
        )
        made = [await self._caller.reliably("RestoreCheckpoint", request) for _ in range(2)]
        first, again = (each.session.status for each in made)
        assert first.session_id == again.session_id, "a second fork"
        self.session_id = first.session_id
        steps = self._saved.steps
        assert (first.steps, first.epochs) == (steps, self._saved.epochs), "another state"
        (rate,) = first.rates
        assert rate.lr in {each.rate for each in changes if each.earliest <= steps}, "another rate"
        await self._step(course, rate.lr)
        await self._delete()

    async def _step(self, course: Course, rate: float) -> None:
        """Take a step with all workers: it must be what torch makes of the same steps."""
        steps = self._saved.steps
        workers = range(self._scene.training.workers)
        digests = [self._random.randbytes(_DIGEST_BYTES) for _ in workers]
        seen = await asyncio.gather(
            *(self._contribute(worker, digests[worker]) for worker in workers)
        )
        assert course.rates is not None
        forked = Course(
            contributions=[*course.contributions[:steps], digests],
            rates=[*course.rates[:steps], rate],
        )
        wanted = hash_of(trajectory(self._scene.training, forked)[-1])
        assert set(seen) == {wanted}, "what was restored is not what was saved"

    async def _contribute(self, worker: int, digest: bytes) -> bytes:
        """Return the hash of the parameters after the step."""
        step = self._saved.steps + 1
        request = request_of(step, digest, self._scene.training.content(digest))
        request.session_id, request.worker = self.session_id, worker
        response = await self._caller.reliably("Step", request)
        return hash_of(tensors_of(response.parameters))

    async def _delete(self) -> None:
        """Delete the checkpoint; then there is none."""
        request = pb.DeleteCheckpointRequest(session_id=self._saved.session_id, name=NAME)
        try:
            await self._caller.reliably("DeleteCheckpoint", request)
        except RefusedError as error:
            if error.reason != "CHECKPOINT_NOT_FOUND":  # Then an answer was lost before.
                raise
        listed = await self._caller.reliably("ListCheckpoints", pb.ListCheckpointsRequest())
        assert not listed.checkpoints, "a checkpoint that is deleted"
