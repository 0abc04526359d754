"""Who is just fast enough with every message, and too slow on the whole, does not keep others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from drivers import take
from event_loop import TIMEOUT_S
from faults.ground import Ground, ground
from messages import chunks_of, header_of, headers_of
from refusals import RefusedError, refused, translated
from scenarios.models import spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.limits import Limits

STALL_S = 1.0
VALUES = {"large": torch.zeros(16_000_000)}  # 64 MB: more than any buffer on the way holds.
SIZE = VALUES["large"].nbytes
TRANSFER_S = STALL_S + 1.0
PAUSE_S = 0.1  # Well below STALL_S; the messages of a transfer would take six seconds.


@pytest.fixture(scope="module")
def slow() -> Iterator[Ground]:
    """Give a transfer of VALUES a second, beside that which a message may take."""
    with ground(Limits(stall_timeout_s=STALL_S, transfer_rate_min=SIZE)) as laid:
        yield laid


@pytest.fixture(scope="module")
def session_id(slow: Ground) -> str:
    created = slow.driver.create(spec(SGD(lr=1), parameters=VALUES))
    session_id: str = created.status.session_id
    slow.driver.upload(session_id, VALUES)
    return session_id


def _trickle(responses: Iterator[object]) -> None:
    for _ in responses:
        time.sleep(PAUSE_S)


def test_a_download_that_trickles_ends_and_training_goes_on(slow: Ground, session_id: str) -> None:
    request = pb.DownloadParametersRequest(session_id=session_id)
    responses = slow.driver.stub.DownloadParameters(request, timeout=TIMEOUT_S)
    assert next(responses).HasField("begin")
    with ThreadPoolExecutor(2) as others, slow.driver.worker(session_id) as worker:
        reader = others.submit(_trickle, responses)
        started = time.monotonic()
        with refused("NO_GRADIENT"):  # It is its turn.
            take(worker, 1, {})
        waited_s = time.monotonic() - started
        with refused("STALLED") as caught, translated():
            reader.result(TIMEOUT_S)
    assert STALL_S < waited_s < 3 * TRANSFER_S
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.expected == f"at least {SIZE:g} bytes in a second"


def test_the_answer_to_a_step_that_trickles_ends_and_uploads_go_on(
    slow: Ground, session_id: str
) -> None:
    gradients = {"large": torch.ones_like(VALUES["large"])}

    def requests() -> Iterator[pb.TrainRequest]:
        yield pb.TrainRequest(open=pb.TrainOpen(session_id=session_id))
        yield pb.TrainRequest(begin=pb.StepBegin(step=1, gradients=headers_of(gradients)))
        for chunks in chunks_of(gradients.values()):
            yield pb.TrainRequest(chunks=chunks)
        yield pb.TrainRequest(end=pb.StepEnd())
        released.wait(TIMEOUT_S)

    released = threading.Event()
    responses = slow.driver.stub.Train(requests(), timeout=TIMEOUT_S)
    assert next(responses).HasField("opened")
    assert next(responses).HasField("begin")  # The step is made; its answer holds the session.
    with ThreadPoolExecutor(1) as other:
        reader = other.submit(_trickle, responses)
        started = time.monotonic()
        slow.driver.upload(session_id, VALUES)
        waited_s = time.monotonic() - started
        with refused("STALLED"), translated():
            reader.result(TIMEOUT_S)
    released.set()
    assert waited_s < 3 * TRANSFER_S
    assert slow.driver.get(session_id).status.steps == 1


def test_an_upload_that_trickles_holds_its_memory_only_so_long(
    slow: Ground, session_id: str
) -> None:
    before = slow.registry.budget.reserved_bytes
    begin = pb.UploadBegin(session_id=session_id, parameters=headers_of(VALUES))

    def requests() -> Iterator[pb.UploadParametersRequest]:
        yield pb.UploadParametersRequest(begin=begin)
        for chunks in chunks_of(VALUES.values()):
            time.sleep(PAUSE_S)
            yield pb.UploadParametersRequest(chunks=chunks)

    started = time.monotonic()
    with refused("STALLED"), translated():
        slow.driver.stub.UploadParameters(requests(), timeout=TIMEOUT_S)
    assert TRANSFER_S <= time.monotonic() - started < 3 * TRANSFER_S
    assert slow.registry.budget.reserved_bytes == before


def test_an_evaluation_that_trickles_holds_its_memory_only_so_long(slow: Ground) -> None:
    before = slow.registry.budget.reserved_bytes
    predictions, targets = torch.zeros(4_000_000, 4), torch.zeros(4_000_000).long()
    begin = pb.LossBegin(
        session_id=slow.session_id,
        predictions=header_of("", predictions),
        targets=header_of("", targets),
    )

    def requests() -> Iterator[pb.EvaluateLossStreamRequest]:
        yield pb.EvaluateLossStreamRequest(begin=begin)
        for chunks in chunks_of([predictions, targets]):
            time.sleep(PAUSE_S)
            yield pb.EvaluateLossStreamRequest(chunks=chunks)

    with refused("STALLED"), translated():
        list(slow.driver.stub.EvaluateLossStream(requests(), timeout=TIMEOUT_S))
    assert slow.registry.budget.reserved_bytes == before


def test_whoever_is_fast_enough_is_not_ended(slow: Ground, session_id: str) -> None:
    try:
        values = slow.driver.download(session_id)
    except RefusedError as error:
        pytest.fail(str(error))
    assert values["large"].shape == VALUES["large"].shape
