"""A simulated worker: it does what a client may do, and some of what it may not.

It loses connections, asks what became of its step, sends it again, forgets everything and begins
anew as another client; it sends too much, too early, too late and twice. What it saw, it writes
into the history.
"""

from __future__ import annotations

import asyncio
from typing import Any

from faults.machines.history import Entry, Saw, Tensors, hash_of
from faults.machines.simulation.line import Line, LostError
from faults.machines.simulation.scene import Scene
from faults.machines.simulation.steps import answer_of, events_of, request_of, spoiled
from messages import tensors_of
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import SessionStatus

_BACKOFF_S = 0.2  # On the mean.
_LOOK_S = 3.0
_CLIENT_ID_BYTES = 16
_DIGEST_BYTES = 8


class UnexpectedError(Exception):
    """The server has answered what it must not."""


class Worker:
    """One worker of the session, through all of its steps."""

    def __init__(self, scene: Scene, number: int) -> None:
        self._scene = scene
        self._number = number
        self._random = scene.random(f"worker {number}")
        self._client_id = self._random.randbytes(_CLIENT_ID_BYTES)
        self._step = 1
        """The next one that it wants to be answered for."""
        self._digest = b""
        """Of what it has sent for that; empty: nothing yet."""
        self._waits = False
        """Whether that lies with the server, and waits for other workers."""
        self._last: tuple[int, bytes] | None = None
        """The last step that it was answered for, and with what content."""
        self._knows = True
        """Whether it knows where it stands: not after it has forgotten everything."""
        self._sure = not scene.training.rollback_max
        """Whether the session cannot have gone back meanwhile."""

    async def train(self) -> None:
        """Take all steps, whatever comes between.

        Where steps may be lost, look from time to time whether the others still need us.
        """
        scene = self._scene
        while not scene.is_over:
            if self._knows and self._step > scene.steps:
                scene.done.add(self._number)
                if self._sure:
                    return
                await asyncio.sleep(_LOOK_S)
            try:
                if self._sure and self._random.random() < 0.15:
                    await self._step_unary()
                else:
                    await self._stream()
            except LostError:
                self._note("lost the connection")
            except RefusedError as error:
                self._note(f"refused: {error.reason}")
                self._expect(error.reason in self._scene.tolerated, f"refused: {error}")
            if self._random.random() < 0.1:
                self._forget()
            await asyncio.sleep(self._random.expovariate(1 / _BACKOFF_S))

    def _forget(self) -> None:
        """Become another client of the same worker."""
        self._note("forgets everything")
        self._client_id = self._random.randbytes(_CLIENT_ID_BYTES)
        self._digest, self._last, self._knows, self._sure = b"", None, False, False

    async def _stream(self) -> None:
        """Take steps on a stream until all are done, or something happens."""
        scene, line = self._scene, self._scene.call("Train", self._random)
        try:
            opening = pb.TrainOpen(
                session_id=scene.session_id, worker=self._number, client_id=self._client_id
            )
            line.send(pb.TrainRequest(open=opening))
            response = await self._receive(line)
            opened = response.opened
            self._look_at(opened.status)
            self._learn(opened.contribution if opened.HasField("contribution") else None)
            while self._step <= scene.steps and not scene.is_over:
                if not self._digest and self._random.random() < 0.3:
                    await self._do_wrong(line)
                await self._take_step(line)
                if self._random.random() < 0.05:
                    await asyncio.sleep(self._random.uniform(0, scene.rest_s))
            line.half_close()
            self._expect(await line.receive() is None, "more than was asked for")
        finally:
            line.break_now()

    def _learn(self, contribution: pb.Contribution | None) -> None:
        """Find out where to go on from, as every client does that comes again."""
        made, digest, waits = 0, b"", False
        if contribution is not None:
            waits = not contribution.applied
            made, digest = contribution.step - waits, contribution.digest
        self._note(f"learns that step {made} was made{', and the next one waits' * waits}")
        if waits and self._knows and made == self._step - 1:
            self._expect(digest == self._digest, "content that was never sent waits")
        if self._knows and self._digest and made == self._step:
            self._expect(digest == self._digest, "content that was never sent was applied")
            waits = True  # There is an answer to be had for it.
            if self._random.random() < 0.5:
                self._log(Saw.TOLD, made)
                self._last = (made, self._digest)
                self._step, self._digest, waits = made + 1, b"", False
        elif not self._knows or made != self._step - 1:
            self._log(Saw.TOLD, made)
            self._last = None
            self._scene.done.discard(self._number)
            self._step, self._digest = made + 1, digest if waits else b""
        self._knows, self._waits = True, waits
        self._sure = not self._scene.training.rollback_max

    def _look_at(self, status: SessionStatus) -> None:
        """Look whether no more can be lost than was agreed."""
        if self._scene.setting.is_durable:
            risk = status.steps - status.durable_steps
            self._expect(
                0 <= risk <= self._scene.training.rollback_max, f"{risk} steps are in memory only"
            )

    async def _take_step(self, line: Line) -> None:
        """Take the next step, as often as it takes."""
        while True:
            step = self._step
            surely = "STORAGE_FULL" not in self._scene.tolerated  # Else its round may be gone.
            if self._waits and surely and self._random.random() < 0.3:
                other = self._random.randbytes(_DIGEST_BYTES)
                await self._be_refused(line, step, other, "STEP_CONFLICT")
            self._digest = self._digest or self._random.randbytes(_DIGEST_BYTES)
            try:
                await self._send_and_hear(line, step, self._digest)
            except RefusedError as error:
                self._note(f"step {step} refused: {error.reason}")
                tolerated = self._scene.tolerated
                # Its round was given up for a full disk, and it has left the content out.
                gone = self._waits and "STORAGE_FULL" in tolerated
                if error.reason == "BYTE_COUNT_MISMATCH" and gone:
                    self._waits = False
                    continue
                if error.reason not in {"ROUND_TIMEOUT", "STORAGE_FULL"}:
                    raise
                self._expect(error.reason in tolerated, f"refused: {error}")
                self._waits = error.reason == "ROUND_TIMEOUT"
                await asyncio.sleep(self._random.expovariate(1 / _BACKOFF_S))
                continue
            self._last = (step, self._digest)
            self._step, self._digest, self._waits = step + 1, b"", False
            return

    async def _send_and_hear(self, line: Line, step: int, digest: bytes) -> None:
        """Send a contribution, and write down its answer."""
        self._log(Saw.SENT, step, digest)
        gradients = self._scene.training.content(digest)
        is_there = self._waits or (self._last == (step, digest))
        without = is_there and self._random.random() < 0.5
        for event in events_of(self._random, step, digest, gradients, without_content=without):
            line.send(event)
        result, parameters = await answer_of(self._scene.training.initial, line.receive)
        self._expect(result.step == step, f"step {step} was answered by {result.step}")
        self._log_answer(result, digest, parameters)

    async def _step_unary(self) -> None:
        """Take the next step in one message each way."""
        step, scene = self._step, self._scene
        self._digest = self._digest or self._random.randbytes(_DIGEST_BYTES)
        self._log(Saw.SENT, step, self._digest)
        request = request_of(step, self._digest, scene.training.content(self._digest))
        request.session_id, request.worker = scene.session_id, self._number
        line = scene.call("Step", self._random)
        line.send(request)
        try:
            response: pb.StepResponse = await self._receive(line)
        finally:
            line.break_now()
        self._expect(response.result.step == step, f"{step} was answered by {response.result}")
        self._log_answer(response.result, self._digest, tensors_of(response.parameters))
        self._last = (step, self._digest)
        self._step, self._digest, self._waits = step + 1, b"", False

    async def _do_wrong(self, line: Line) -> None:
        """Do something that must be refused, or answered as before, and have no effect."""
        step, other = self._step, self._random.randbytes(_DIGEST_BYTES)
        gradients = self._scene.training.content(other)
        match self._random.randrange(6):
            case 0 if self._last:
                self._note(f"sends step {self._last[0]} again")
                await self._send_and_hear(line, *self._last)
            case 1 if self._last:
                await self._be_refused(line, self._last[0], other, "STEP_CONFLICT")
            case 2:
                await self._be_refused(line, step + 1, other, "STEP_OUT_OF_ORDER")
            case 3 if step > 2:
                await self._be_refused(line, step - 2, other, "STEP_OUT_OF_ORDER")
            case 4:
                await self._be_refused(line, step, other, "NON_FINITE_GRADIENT", finite=False)
            case _:
                self._note(f"begins step {step}, and gives it up")
                events = list(events_of(self._random, step, other, gradients))
                if len(events) > 1:  # Else it would be whole.
                    for event in events[: self._random.randrange(1, len(events))]:
                        line.send(event)

    async def _be_refused(
        self, line: Line, step: int, digest: bytes, reason: str, *, finite: bool = True
    ) -> None:
        """Send a contribution that must be refused for a reason."""
        self._note(f"sends what must be refused: {reason}")
        gradients = self._scene.training.content(digest)
        gradients = gradients if finite else spoiled(self._random, gradients)
        for event in events_of(self._random, step, digest, gradients):
            line.send(event)
        try:
            result, _ = await answer_of(self._scene.training.initial, line.receive)
        except RefusedError as error:
            if error.reason in {"SESSION_FAILED", "STORAGE_FULL"}:
                raise
            self._expect(error.reason == reason, f"{error} in the place of {reason}")
        else:
            raise UnexpectedError(f"worker {self._number}: {reason} expected, and {result} came")

    async def _receive(self, line: Line) -> Any:
        message = await line.receive()
        self._expect(message is not None, "the call has ended without an answer")
        return message

    def _expect(self, held: bool, otherwise: str) -> None:
        if not held:
            raise UnexpectedError(f"worker {self._number}: {otherwise}")

    def _note(self, what: str) -> None:
        self._scene.note(f"worker {self._number} {what}")

    def _log_answer(self, result: pb.StepResult, digest: bytes, parameters: Tensors) -> None:
        (used,) = result.rates
        self._log(Saw.ANSWERED, result.step, digest, hash_of(parameters), used.lr)

    def _log(
        self,
        saw: Saw,
        step: int,
        digest: bytes = b"",
        parameters: bytes = b"",
        rate: float | None = None,
    ) -> None:
        self._note(f"{saw} {step} {digest.hex()} {parameters.hex()}")
        self._scene.log.append(
            Entry(
                worker=self._number,
                saw=saw,
                step=step,
                digest=digest,
                parameters=parameters,
                rate=rate,
            )
        )
