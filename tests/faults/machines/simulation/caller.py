"""Calls of one message each way, and downloads: made again until they are answered."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

from faults.machines.history import Tensors
from faults.machines.simulation.line import LostError
from faults.machines.simulation.scene import Scene
from faults.machines.simulation.steps import gathered, named
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb

_LATER_S = 0.3


class Caller:
    """Makes calls that are beside the training, or around it."""

    def __init__(self, scene: Scene, random: Random) -> None:
        self._scene = scene
        self._random = random

    async def reliably(self, method: str, request: Any) -> Any:
        """Make a call until it is answered.

        Raises:
            RefusedError: It must not be refused so.
        """
        while True:
            try:
                return await self.once(method, request)
            except LostError:
                continue
            except RefusedError as error:
                await self.bear(error)

    async def once(self, method: str, request: Any) -> Any:
        """Make a call.

        Raises:
            LostError: Nobody knows what has come of it.
            RefusedError: It was refused.
        """
        line = self._scene.call(method, self._random)
        line.send(request)
        try:
            response = await line.receive()
        finally:
            line.break_now()
        assert response is not None, f"{method} has not answered"
        return response

    async def bear(self, error: RefusedError) -> None:
        """Come again later, unless the refusal is one that must not be."""
        if error.reason not in self._scene.tolerated:
            raise error
        self._scene.note(f"refused: {error.reason}")
        await asyncio.sleep(_LATER_S)

    async def download(self, session_id: str) -> tuple[int, Tensors]:
        """Return where a session stands, and its parameters."""
        request = pb.DownloadParametersRequest(session_id=session_id)
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
                await self.bear(error)
                continue
            finally:
                line.break_now()
            return begin.steps, named(self._scene.training.initial, gathered(chunks))
