"""Whoever looks after a session while it is trained: other rates, ends of epochs, checkpoints.

Each change is asked for until it is answered, and only then the next one. So they have an order;
an answer to the first asking says between which steps a change was made, any other at the latest.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from faults.machines.history import RateChange
from faults.machines.simulation.caller import Caller
from faults.machines.simulation.line import LostError
from faults.machines.simulation.scene import RATE, Scene
from parity.cases import choose
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.session_pb2 import SessionStatus

EPOCH_SHARE = 0.5
"""What the end of an epoch leaves of a rate."""
NAME = "the one"
"""Of the checkpoint."""

_RATES = (0.5, 0.375, 0.25, 0.1875)
_DEEDS_MAX = 4
_PAUSE_S = 0.3  # On the mean: some steps.


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint."""

    session_id: str
    steps: int
    epochs: int


class Operator:
    """Changes a session, and saves it once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._random = scene.random("operator")
        self._caller = Caller(scene, self._random)
        self.changes = [RateChange(rate=RATE, earliest=0, latest=0)]
        """All rates that were in force, in their order."""
        self.checkpoint: Saved | None = None
        self._epochs = 0
        self._epoch_from = 0  # The steps that there were when the last epoch ended, at most.
        self._steps = 0  # That the session had made when it was last heard of.

    async def work(self) -> None:
        """Do some things, one after the other, for as long as the session is trained."""
        for _ in range(self._random.randrange(_DEEDS_MAX + 1)):
            await asyncio.sleep(self._random.expovariate(1 / _PAUSE_S))
            if self._scene.is_over:
                return
            match self._random.randrange(5):
                case 0 | 1:
                    await self._set_rate(self._random.choice(_RATES))
                case 2 | 3:
                    await self._end_epoch()
                case _ if self.checkpoint is None:
                    await self._save()

    async def look(self) -> None:
        """Make sure that the session has all changes, each once."""
        request = pb.GetSessionRequest(session_id=self._scene.session_id)
        response = await self._caller.reliably("GetSession", request)
        status = response.session.status
        (rate,) = status.rates
        seen, wanted = (status.epochs, rate.lr), (self._epochs, self.changes[-1].rate)
        assert seen == wanted, f"epochs and rate are {seen}, and must be {wanted}"

    async def _set_rate(self, rate: float) -> None:
        kind = type(self._scene.setting.optimizer)(lr=rate)
        request = pb.UpdateSessionRequest(
            session_id=self._scene.session_id, optimizer=choose(Optimizer(), kind)
        )
        response, at_first = await self._insist("UpdateSession", request)
        self._changed(rate, response.session.status, at_first=at_first)

    async def _end_epoch(self) -> None:
        request = pb.EndEpochRequest(session_id=self._scene.session_id, epoch=self._epochs + 1)
        try:
            response, at_first = await self._insist("EndEpoch", request)
        except RefusedError as error:
            if error.reason != "EPOCH_EMPTY" or self._steps > self._epoch_from:
                raise
            return
        self._epochs += 1
        self._epoch_from = response.status.steps
        self._changed(self.changes[-1].rate * EPOCH_SHARE, response.status, at_first=at_first)

    async def _save(self) -> None:
        request = pb.SaveCheckpointRequest(session_id=self._scene.session_id, name=NAME)
        try:
            response, _ = await self._insist("SaveCheckpoint", request)
            saved = response.checkpoint
        except RefusedError as error:
            if error.reason != "CHECKPOINT_EXISTS":
                raise
            # The answer was lost, and the session has gone on: what was saved is listed.
            listed = await self._caller.reliably("ListCheckpoints", pb.ListCheckpointsRequest())
            (saved,) = listed.checkpoints
        assert saved.name == NAME
        self.checkpoint = Saved(session_id=saved.session_id, steps=saved.steps, epochs=saved.epochs)
        self._scene.note(f"operator: step {saved.steps} is saved")

    async def _insist(self, method: str, request: Any) -> tuple[Any, bool]:
        """Ask until it is answered; return also whether nothing can have been done before."""
        at_first = True
        while True:
            try:
                return await self._caller.once(method, request), at_first
            except LostError:
                at_first = False
            except RefusedError as error:
                at_first = at_first and error.reason != "SESSION_FAILED"
                await self._caller.bear(error)

    def _changed(self, rate: float, status: SessionStatus, *, at_first: bool) -> None:
        """Note a change that was answered."""
        earliest = status.steps if at_first else self._steps
        change = RateChange(rate=rate, earliest=earliest, latest=status.steps)
        self._scene.note(f"operator: {change}")
        self.changes.append(change)
        self._steps = status.steps
