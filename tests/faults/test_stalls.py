"""A client that neither sends nor reads in the middle of a transfer is let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from drivers import take
from event_loop import TIMEOUT_S
from faults.ground import STEPS, Ground, ground
from messages import header_of
from refusals import refused, translated
from scenarios.models import create, gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.limits import Limits

STALL_S = 0.5


@pytest.fixture(scope="module")
def hasty() -> Iterator[Ground]:
    """Serve with little patience."""
    with ground(Limits(stall_timeout_s=STALL_S)) as laid:
        yield laid


def _upload(where: Ground) -> tuple[Callable[..., object], list[pb.UploadParametersRequest]]:
    headers = [header_of("w", model()["w"])]
    begin = pb.UploadBegin(session_id=where.session_id, parameters=headers)
    return where.driver.stub.UploadParameters, [pb.UploadParametersRequest(begin=begin)]


def _evaluation(where: Ground) -> tuple[Callable[..., object], list[pb.EvaluateLossStreamRequest]]:
    begin = pb.LossBegin(
        session_id=where.session_id,
        predictions=header_of("", torch.zeros(3, 4)),
        targets=header_of("", torch.zeros(3).long()),
    )
    stub = where.driver.stub
    call = lambda requests: list(stub.EvaluateLossStream(requests, timeout=TIMEOUT_S))  # noqa: E731
    return call, [pb.EvaluateLossStreamRequest(begin=begin)]


def _step(where: Ground) -> tuple[Callable[..., object], list[pb.TrainRequest]]:
    opening = pb.TrainOpen(session_id=where.session_id)
    begin = pb.StepBegin(step=STEPS + 1, gradients=[header_of("w", model()["w"])])
    stub = where.driver.stub
    call = lambda requests: list(stub.Train(requests, timeout=TIMEOUT_S))  # noqa: E731
    return call, [pb.TrainRequest(open=opening), pb.TrainRequest(begin=begin)]


@pytest.mark.parametrize("stalled", [_upload, _evaluation, _step])
def test_a_transfer_that_stalls_is_ended_and_leaves_nothing(
    hasty: Ground, stalled: Callable[[Ground], tuple[Callable[..., object], list[object]]]
) -> None:
    before = hasty.look()
    released = threading.Event()
    call, beginning = stalled(hasty)

    def requests() -> Iterator[object]:
        yield from beginning
        released.wait(TIMEOUT_S)

    started = time.monotonic()
    with refused("STALLED") as caught, translated():
        call(requests())
    released.set()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert STALL_S <= time.monotonic() - started < 20 * STALL_S
    assert hasty.look() == before


def test_a_stream_that_is_opened_and_never_begun_is_ended(hasty: Ground) -> None:
    released = threading.Event()

    def nothing() -> Iterator[pb.TrainRequest]:
        released.wait(TIMEOUT_S)
        yield from ()

    with refused("STALLED"), translated():
        next(hasty.driver.stub.Train(nothing(), timeout=TIMEOUT_S))
    released.set()


def test_a_stream_may_rest_between_two_steps_for_as_long_as_it_likes(hasty: Ground) -> None:
    session_id = create(hasty.driver, spec(SGD(lr=1)))
    with hasty.driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        time.sleep(2.5 * STALL_S)
        assert take(worker, 2, gradients(2)).result.step == 2
    hasty.driver.delete(session_id)


def test_a_worker_that_waits_for_others_does_not_stall(hasty: Ground) -> None:
    session_id = create(hasty.driver, spec(SGD(lr=1), workers=2))
    with hasty.driver.worker(session_id, 0) as first, hasty.driver.worker(session_id, 1) as second:
        waiting = first.start(1, gradients(1))
        time.sleep(2.5 * STALL_S)
        take(second, 1, gradients(2))
        assert waiting.result(TIMEOUT_S).result.step == 1
    hasty.driver.delete(session_id)


def test_a_client_that_does_not_read_holds_the_session_only_so_long(hasty: Ground) -> None:
    values = {"large": torch.zeros(16_000_000)}  # 64 MB: more than any buffer on the way holds.
    session_id = hasty.driver.create(spec(SGD(lr=1), parameters=values)).status.session_id
    hasty.driver.upload(session_id, values)
    request = pb.DownloadParametersRequest(session_id=session_id)
    unread = hasty.driver.stub.DownloadParameters(request, timeout=TIMEOUT_S)
    assert next(unread).HasField("begin")
    with ThreadPoolExecutor(1) as other, hasty.driver.worker(session_id) as worker:
        started = time.monotonic()
        answer = other.submit(take, worker, 1, {}).exception(TIMEOUT_S)
        assert "NO_GRADIENT" in str(answer)
        assert time.monotonic() - started < 20 * STALL_S
    with refused("STALLED"), translated():
        list(unread)
    hasty.driver.delete(session_id)
