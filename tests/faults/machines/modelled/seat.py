"""The call that sends for a worker: an open stream, or one step in one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from event_loop import TIMEOUT_S
from faults.machines.modelled.session import Content
from faults.strangers import ChannelDriver
from messages import bytes_of, chunks_of, headers_of, messages_of
from refusals import translated
from scenarios.models import model
from streams import RawStream

from optserve.v1 import optimizer_service_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A contribution as it is sent."""

    step: int
    content: Content
    digest: bytes
    form: str
    """How: "packed" if it can be, "bare" without its content, or in chunks."""

    @property
    def is_bare(self) -> bool:
        """Whether the content is left out."""
        return self.form == "bare"


@dataclass(slots=True, kw_only=True)
class Seat:
    """Who sends for a worker, and whether an answer is still to come."""

    stream: RawStream | None = None
    client_id: bytes = b""
    waits: bool = False
    """Whether its step waits for other workers."""
    again: bool = False
    """Whether that was sent before: then nobody knows whether the step was faster."""
    _call: Any = None  # What the stub has for an answer that is to come.

    def send(self, driver: ChannelDriver, session_id: str, worker: int, sent: Sent) -> None:
        """Send a contribution; its answer is left to answer()."""
        if self.stream:
            _send(self.stream, sent)
        else:
            self._call = driver.stub.Step.future(
                request_of(session_id, worker, sent), timeout=TIMEOUT_S
            )

    def answer(self) -> tuple[pb.StepResult, Sequence[bytes]]:
        """Wait for what a step did, and the parameters after it.

        Raises:
            RefusedError: It was refused.
        """
        self.waits = self.again = False
        if self.stream is None:
            with translated():
                response: pb.StepResponse = self._call.result()
            return response.result, [each.data for each in response.parameters]
        answer = self.stream.answer()
        if answer.refusal:
            raise answer.refusal
        assert answer.result is not None
        return answer.result, list(answer.parameters.values())

    def leave(self) -> None:
        """Break the call off."""
        if self.stream:
            self.stream.cancel()
        elif self._call:
            self._call.cancel()


def request_of(session_id: str, worker: int, sent: Sent) -> pb.StepRequest:
    """Return a contribution in one message."""
    gradients = messages_of(sent.content)
    if sent.is_bare:
        for gradient in gradients:
            gradient.data = b""
    return pb.StepRequest(
        session_id=session_id,
        worker=worker,
        step=sent.step,
        gradients=gradients,
        digest=sent.digest,
    )


def _send(stream: RawStream, sent: Sent) -> None:
    if sent.form == "packed" and len(sent.content) == len(model()):
        data = [bytes_of(each) for each in sent.content.values()]
        stream.send(packed=pb.PackedStep(step=sent.step, gradients=data, digest=sent.digest))
        return
    begin = pb.StepBegin(step=sent.step, gradients=headers_of(sent.content))
    if sent.is_bare:
        begin.digest = sent.digest
    stream.send(begin=begin)
    if not sent.is_bare:
        stream.chunks(list(chunks_of(sent.content.values())))
    stream.end(sent.digest)
