"""One seed: a server, its clients, and everything that goes wrong between them, in one thread."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from faults.machines.history import Entry, Saw, Verdict, judge
from faults.machines.simulation.caller import Caller
from faults.machines.simulation.clockwork import Clockwork
from faults.machines.simulation.fork import Fork
from faults.machines.simulation.host import Host
from faults.machines.simulation.operator import EPOCH_SHARE, Operator
from faults.machines.simulation.scene import Promise, Scene
from faults.machines.simulation.worker import Worker
from messages import messages_of
from refusals import RefusedError
from scenarios.models import EPOCHS_UNIT, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.scheduler_pb2 import ExponentialLR

_END_S = 3_600.0  # Of simulated time: whoever is not done by then waits for ever.


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What has become of one seed."""

    seed: int
    verdict: Verdict
    failures: tuple[str, ...]
    trace: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise has held."""
        return self.verdict.ok and not self.failures


def simulate(seed: int, promises: Sequence[Promise] = tuple(Promise)) -> Outcome:
    """Run one seed, with a session that is made one of the promises."""
    loop = Clockwork()
    asyncio.set_event_loop(loop)
    scene = Scene(seed, loop, promises)
    world = _World(scene)
    failures: list[str] = []
    try:
        with _seeded_secrets(scene), _silence(), world.host.late_commits():
            loop.run_until_complete(asyncio.wait_for(world.run(), _END_S))
    except TimeoutError:
        failures.append("somebody waits for ever")
    except ExceptionGroup as group:
        failures += [repr(error) for error in group.exceptions]
    except Exception as error:  # noqa: BLE001 - Whatever it is, it is what was looked for.
        failures.append(repr(error))
    finally:
        _wind_down(loop)
        asyncio.set_event_loop(None)
    failures += scene.faults + loop.faults
    return Outcome(
        seed=seed, verdict=world.verdict, failures=tuple(failures), trace=tuple(scene.trace)
    )


class _World:
    """The actors of one seed."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._random = scene.random("world")
        self.host = Host(scene)
        self.verdict = Verdict()
        self._caller = Caller(scene, self._random)
        self._operator = Operator(scene)

    async def run(self) -> None:
        """Train a session to its end, and look at what has come of it."""
        scene = self._scene
        running = asyncio.create_task(self.host.run())
        await self._create()
        async with asyncio.TaskGroup() as group:
            for number in range(scene.training.workers):
                group.create_task(Worker(scene, number).train())
            if scene.setting.operates:
                group.create_task(self._operator.work())
        steps, parameters = await self._caller.download(scene.session_id)
        if scene.training.rollback_max:  # It may have gone back once more: now they know.
            scene.log += [
                Entry(worker=number, saw=Saw.TOLD, step=steps)
                for number in range(scene.training.workers)
            ]
        changes = self._operator.changes
        self.verdict = judge(scene.log, scene.training, steps, parameters, changes)
        if scene.setting.operates:
            await self._operator.look()
        await self._delete(scene.session_id)
        if self.verdict.course and self._operator.checkpoint:
            fork = Fork(scene, self._operator.checkpoint)
            await fork.train(self.verdict.course, changes)
            await self._delete(fork.session_id)
        await self._look_for_leaks()
        running.cancel()

    async def _create(self) -> None:
        """Create the session, as often as it takes: one request, one session."""
        scene = self._scene
        request = pb.CreateSessionRequest(
            spec=spec(
                scene.setting.optimizer,
                parameters=scene.training.initial,
                workers=scene.training.workers,
                scheduler=ExponentialLR(gamma=EPOCH_SHARE),
                unit=EPOCHS_UNIT,
            ),
            values=messages_of(scene.training.initial),
            request_id="the one",
        )
        request.spec.durability.CopyFrom(scene.setting.durability)
        request.spec.limits.round_timeout_s = scene.setting.round_timeout_s
        response = await self._caller.reliably("CreateSession", request)
        scene.session_id = response.session.status.session_id
        again = await self._caller.reliably("CreateSession", request)
        listed = await self._caller.reliably("ListSessions", pb.ListSessionsRequest())
        assert again.session.status.session_id == scene.session_id, "a second session"
        assert [each.session_id for each in listed.sessions] == [scene.session_id]

    async def _delete(self, session_id: str) -> None:
        """Delete a session."""
        request = pb.DeleteSessionRequest(session_id=session_id)
        try:
            await self._caller.reliably("DeleteSession", request)
        except RefusedError as error:
            if error.reason != "SESSION_NOT_FOUND":  # Then an answer was lost before.
                raise

    async def _look_for_leaks(self) -> None:
        """Make sure that nothing is left of sessions that are gone."""
        # Some calls have not noticed that nobody is there; a server that has just come will.
        while self._scene.serving:
            await asyncio.wait(self._scene.serving)
        await self.host.up.wait()
        left = self.host.registry.budget.reserved_bytes
        assert left == 0, f"{left} bytes are reserved for nobody"


@contextmanager
def _seeded_secrets(scene: Scene) -> Iterator[None]:
    """Let what no client may guess come from the seed too: it decides about orders."""
    random = scene.random("secrets")

    def token_bytes(count: int) -> bytes:
        return random.randbytes(count)

    def token_hex(count: int) -> str:
        return random.randbytes(count).hex()

    with (
        patch.object(secrets, "token_bytes", token_bytes),
        patch.object(secrets, "token_hex", token_hex),
    ):
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Let the server's log say nothing of disks that fail."""
    logger = logging.getLogger("optserve_server")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wind_down(loop: Clockwork) -> None:
    """End whatever still goes on, so that the next seed begins with nothing."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()
