"""A step whose connection breaks: what the next stream is sent, by what the server has of it."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import grpc
import numpy as np
import pytest

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Reason, Refusal
from optserve.v1.session_pb2 import Session, SessionSpec, SessionStatus
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.wire import Chunk
from optserve_client._effects import Converse, Effect, Open, Operation, Pause
from optserve_client._exchange import TrainEvent
from optserve_client._outages import Outages
from optserve_client._session_operations import SessionOperations
from optserve_client._terms import Terms
from optserve_client.config import ClientConfig, Retry
from optserve_client.errors import StepsLostError, StepUnknownError, UnavailableError
from optserve_client.progress import TransferReporter
from optserve_client.results import StepResult

STEPS = 4  # Of the session, when the client comes.
SIZE = 600  # Elements: three chunks of a small message.
GRADIENT = np.arange(SIZE, dtype=np.float32)
GONE = UnavailableError("gone")


class Conversation:
    """Performs an operation by hand."""

    def __init__(self, retry: Retry | None = None) -> None:
        header = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[SIZE])
        spec = SessionSpec(parameters=[header])
        session = Session(status=SessionStatus(session_id="id", steps=STEPS), spec=spec)
        config = ClientConfig(lane="grpc", chunk_bytes=1_000, retry=retry or Retry())
        terms = Terms(
            config=config,
            chunk_bytes=1_000,
            reporter=TransferReporter(progress=False),
            outages=Outages("here", config.retry),
        )
        operations = SessionOperations(session, terms=terms, worker=0, via="stream")
        self._step: Operation[StepResult] = operations.step({"w": GRADIENT}, step=None, via=None)
        self._effect: Effect = next(self._step)

    def opened(self, steps: int = STEPS, **contribution: Any) -> None:  # noqa: ANN401
        """Open the stream, and say what the server has."""
        assert isinstance(self._effect, Open)
        opened = pb.TrainOpened(status=SessionStatus(session_id="id", steps=steps))
        if contribution:
            opened.contribution.CopyFrom(pb.Contribution(**contribution))
        self._effect.opening.receive(pb.TrainResponse(opened=opened))
        self._effect = self._step.send(None)

    def sent(self, count: int = 99) -> list[TrainEvent]:
        """Take the first messages of the step."""
        assert isinstance(self._effect, Converse)
        return list(islice(self._effect.exchange.requests(), count))

    def breaks(self) -> None:
        """Break the connection, and let the pause pass."""
        self._effect = self._step.throw(GONE)
        assert isinstance(self._effect, Pause)
        self._effect = self._step.send(None)

    def refused(self, reason: Reason.ValueType) -> None:
        """Refuse the step."""
        assert isinstance(self._effect, Converse)
        refusal = Refusal(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], reason=reason)
        refused = pb.StepRefused(step=STEPS + 1, refusal=refusal)
        assert self._effect.exchange.receive(pb.TrainResponse(refused=refused))
        self._effect = self._step.send(None)

    def answered(self, *, replayed: bool = False) -> StepResult:
        """Answer the step."""
        assert isinstance(self._effect, Converse)
        receive = self._effect.exchange.receive
        receive(pb.TrainResponse(begin=pb.ParametersBegin(step=STEPS + 1)))
        receive([Chunk(0, 0, memoryview(bytes(4 * SIZE)))])
        assert receive(pb.TrainResponse(result=pb.StepResult(step=STEPS + 1, replayed=replayed)))
        with pytest.raises(StopIteration) as stop:
            self._step.send(None)
        result: StepResult = stop.value.value
        return result


def events(requests: list[TrainEvent]) -> list[str | None]:
    return ["chunks" if isinstance(each, list) else each.WhichOneof("event") for each in requests]


def digest_of(requests: list[TrainEvent]) -> bytes:
    last = requests[-1]
    assert isinstance(last, pb.TrainRequest)
    assert last.end.digest
    return last.end.digest


WHOLE = ["begin", "chunks", "chunks", "chunks", "end"]


def test_what_the_server_has_is_asked_for_without_the_gradients() -> None:
    step = Conversation()
    step.opened()
    digest = digest_of(step.sent())
    step.breaks()
    step.opened(STEPS + 1, step=STEPS + 1, digest=digest, applied=True)
    begin, end = step.sent()
    assert begin == pb.TrainRequest(
        begin=pb.StepBegin(step=STEPS + 1, every_parameter=True, digest=digest)
    )
    assert end == pb.TrainRequest(end=pb.StepEnd())
    assert step.answered(replayed=True).replayed


def test_what_the_server_has_given_up_since_it_was_asked_is_sent_again() -> None:
    step = Conversation()
    step.opened()
    digest = digest_of(step.sent())
    step.breaks()
    step.opened(step=STEPS + 1, digest=digest)
    assert events(step.sent()) == ["begin", "end"]
    step.refused(Reason.REASON_BYTE_COUNT_MISMATCH)
    again = step.sent()
    assert events(again) == WHOLE
    assert digest_of(again) == digest
    assert step.answered().step == STEPS + 1


@pytest.mark.parametrize(
    "contribution",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"step": STEPS, "digest": b"another", "applied": True}, id="the-one-before"),
        pytest.param({"step": STEPS + 1, "digest": b"another"}, id="other-content"),
    ],
)
def test_what_the_server_has_not_is_sent_again(contribution: dict[str, Any]) -> None:
    step = Conversation()
    step.opened()
    digest = digest_of(step.sent())
    step.breaks()
    step.opened(**contribution)
    again = step.sent()
    assert events(again) == WHOLE
    assert digest_of(again) == digest
    assert step.answered().step == STEPS + 1


def test_what_was_not_sent_to_its_end_cannot_be_there() -> None:
    step = Conversation()
    step.opened()
    assert events(step.sent(4)) == WHOLE[:4]
    step.breaks()
    step.opened(step=STEPS + 1, digest=b"of somebody else's", applied=False)
    assert events(step.sent()) == WHOLE


@pytest.mark.parametrize(("count", "error"), [(99, StepUnknownError), (4, UnavailableError)])
def test_only_what_was_sent_to_its_end_is_unknown(count: int, error: type[Exception]) -> None:
    step = Conversation(Retry.never())
    step.opened()
    step.sent(count)
    with pytest.raises(error):
        step.breaks()


def test_what_the_server_denies_is_not_unknown_any_more() -> None:
    step = Conversation(Retry(give_up_after_s=0.001, backoff_s=0))
    step.opened()
    step.sent()
    step.breaks()
    time.sleep(0.002)
    step.opened()  # It has nothing of it.
    step.sent(2)
    with pytest.raises(UnavailableError):
        step.breaks()


def test_a_server_that_stands_before_an_answered_step_has_lost_it() -> None:
    step = Conversation()
    step.opened()
    step.sent()
    step.breaks()
    with pytest.raises(StepsLostError) as caught:
        step.opened(STEPS - 2)
    assert (caught.value.resumes_from, caught.value.lost) == (STEPS - 1, 2)
