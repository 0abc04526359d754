"""One seed: a server, its clients, and everything that goes wrong between them, in one thread."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from faults.machines.history import Tensors, Verdict, judge
from faults.machines.simulation.clockwork import Clockwork, LateThreads
from faults.machines.simulation.line import LostError
from faults.machines.simulation.scene import Scene
from faults.machines.simulation.steps import gathered, named
from faults.machines.simulation.worker import Worker
from messages import messages_of
from refusals import RefusedError
from scenarios.models import spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.device import Device
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.surroundings import Surroundings
from optserve_server.rpc.servicer import OptimizerServicer

_END_S = 36_000.0  # Of simulated time: whoever is not done by then waits for ever.


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


def simulate(seed: int) -> Outcome:
    """Run one seed."""
    loop = Clockwork()
    asyncio.set_event_loop(loop)
    scene = Scene(seed, loop)
    world = _World(scene)
    failures: list[str] = []
    try:
        with _seeded_secrets(scene):
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
        self.verdict = Verdict()

    async def run(self) -> None:
        """Train a session to its end, and look at what has come of it."""
        self._start()
        scene = self._scene
        await self._create()
        async with asyncio.TaskGroup() as group:
            for number in range(scene.training.workers):
                group.create_task(Worker(scene, number).train())
        steps, parameters = await self._download()
        self.verdict = judge(scene.log, scene.training, steps, parameters)
        await self._delete()

    def _start(self) -> None:
        """Start a server."""
        scene = self._scene
        self._threads = LateThreads(scene.loop, scene.random("threads"))
        surroundings = Surroundings(
            device=Device("cpu"),
            executor=self._threads,
            clock=scene.loop.time,
            monotonic=scene.loop.time,
            observer=NullObserver(),
            shared_memory=False,
        )
        self._registry = SessionRegistry(Limits(), surroundings)
        servicer = OptimizerServicer(self._registry)
        scene.methods = lambda name: getattr(servicer, name)

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
        await asyncio.gather(*self._scene.serving)  # Some have not noticed that nobody is there.
        left = self._registry.budget.reserved_bytes
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
            finally:
                line.break_now()
            assert response is not None, f"{method} has not answered"
            return response


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


def _wind_down(loop: Clockwork) -> None:
    """End whatever still goes on, so that the next seed begins with nothing."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()
