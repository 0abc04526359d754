"""One seed: a server, its clients, and everything that goes wrong between them, in one thread."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from faults.machines.history import Entry, Saw, Tensors, Verdict, judge
from faults.machines.simulation.clockwork import Clockwork
from faults.machines.simulation.host import Host
from faults.machines.simulation.line import LostError
from faults.machines.simulation.scene import Promise, Scene
from faults.machines.simulation.steps import gathered, named
from faults.machines.simulation.worker import Worker
from messages import messages_of
from refusals import RefusedError
from scenarios.models import spec

from optserve.v1 import optimizer_service_pb2 as pb

_LATER_S = 0.3
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

    async def run(self) -> None:
        """Train a session to its end, and look at what has come of it."""
        scene = self._scene
        running = asyncio.create_task(self.host.run())
        await self._create()
        async with asyncio.TaskGroup() as group:
            for number in range(scene.training.workers):
                group.create_task(Worker(scene, number).train())
        steps, parameters = await self._download()
        if scene.training.rollback_max:  # It may have gone back once more: now they know.
            scene.log += [
                Entry(worker=number, saw=Saw.TOLD, step=steps)
                for number in range(scene.training.workers)
            ]
        self.verdict = judge(scene.log, scene.training, steps, parameters)
        await self._delete()
        running.cancel()

    async def _create(self) -> None:
        """Create the session, as often as it takes: one request, one session."""
        scene = self._scene
        request = pb.CreateSessionRequest(
            spec=spec(
                scene.setting.optimizer,
                parameters=scene.training.initial,
                workers=scene.training.workers,
            ),
            values=messages_of(scene.training.initial),
            request_id="the one",
        )
        request.spec.durability.CopyFrom(scene.setting.durability)
        request.spec.limits.round_timeout_s = scene.setting.round_timeout_s
        response = await self._reliably("CreateSession", request)
        scene.session_id = response.session.status.session_id
        again = await self._reliably("CreateSession", request)
        listed = await self._reliably("ListSessions", pb.ListSessionsRequest())
        assert again.session.status.session_id == scene.session_id, "a second session"
        assert [each.session_id for each in listed.sessions] == [scene.session_id]

    async def _download(self) -> tuple[int, Tensors]:
        """Return where the session stands, and its parameters."""
        request = pb.DownloadParametersRequest(session_id=self._scene.session_id)
        while True:
            line = self._scene.call("DownloadParameters", self._random)
            line.send(request)
            try:
                begin = (await line.receive()).begin
                chunks = []
                while (message := await line.receive()) is not None:
                    chunks += message
            except LostError:
                continue
            except RefusedError as error:
                await self._bear(error)
                continue
            finally:
                line.break_now()
            return begin.steps, named(self._scene.training.initial, gathered(chunks))

    async def _delete(self) -> None:
        """Delete the session; nothing may be left of it."""
        request = pb.DeleteSessionRequest(session_id=self._scene.session_id)
        try:
            await self._reliably("DeleteSession", request)
        except RefusedError as error:
            if error.reason != "SESSION_NOT_FOUND":  # Then an answer was lost before.
                raise
        # Some calls have not noticed that nobody is there; a server that has just come will.
        while self._scene.serving:
            await asyncio.wait(self._scene.serving)
        await self.host.up.wait()
        left = self.host.registry.budget.reserved_bytes
        assert left == 0, f"{left} bytes are reserved for nobody"

    async def _reliably(self, method: str, request: Any) -> Any:
        """Make a call of one message each way, until it is answered."""
        while True:
            line = self._scene.call(method, self._random)
            line.send(request)
            try:
                response = await line.receive()
            except LostError:
                continue
            except RefusedError as error:
                await self._bear(error)
                continue
            finally:
                line.break_now()
            assert response is not None, f"{method} has not answered"
            return response

    async def _bear(self, error: RefusedError) -> None:
        """Come again later, unless the refusal is one that must not be."""
        if error.reason not in self._scene.tolerated:
            raise error
        self._scene.note(f"refused: {error.reason}")
        await asyncio.sleep(_LATER_S)


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
