"""Connections that are half open, cut or not read: their client goes on at once on another one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from drivers import take
from drivers_grpc import StubDriver
from event_loop import EventLoopThread
from faults.ground import STEPS, ground
from messages import chunks_of
from refusals import refused
from relay import Relay, relay
from scenarios.models import assert_same, create, gradients, spec
from server_process import ServerProcess
from streams import raw_stream

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

ME = b"m" * 16
DIGEST = b"d" * 32
SOON_S = 10.0  # Long before stall_timeout_s, which is a minute, lets anybody go.
LARGE = {"large": torch.zeros(8_000_000)}  # 32 MB: more than any buffer on the way holds.
GRADIENT = {"large": torch.ones(8_000_000)}


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Relay]:
    with relay(server.address) as running:
        yield running


@contextmanager
def soon() -> Iterator[None]:
    """Make sure that nobody waits in the block for something that does not come."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON_S


def _large_session(driver: StubDriver) -> str:
    session_id = driver.create(spec(SGD(lr=1), parameters=LARGE)).status.session_id
    driver.upload(session_id, LARGE)
    return session_id


def test_a_client_goes_on_beside_a_connection_that_is_half_open(
    process_driver: StubDriver, wire: Relay
) -> None:
    session_id = create(process_driver, spec(SGD(lr=1)))
    with StubDriver(wire.address) as lost, raw_stream(lost, session_id, ME) as old:
        first = old.step(1, list(gradients(1).values()))
        assert first.result is not None
        wire.stall()
        with soon(), process_driver.worker(session_id, client_id=ME) as new:
            assert new.status.steps == 1
            assert take(new, 1, gradients(1)).result.replayed
            assert take(new, 2, gradients(2)).result.step == 2


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["begun", "half-sent"])
def test_a_step_whose_upload_was_broken_off_is_sent_anew(
    process_driver: StubDriver, wire: Relay, share: float
) -> None:
    session_id = _large_session(process_driver)
    chunks = list(chunks_of(GRADIENT.values()))
    with StubDriver(wire.address) as lost, raw_stream(lost, session_id, ME) as old:
        old.begin(1, DIGEST)
        sent = chunks[: int(share * len(chunks))]
        old.chunks(sent)
        assert wire.wait_for(sent=sum(len(each.chunks[0].data) for each in sent))
        wire.stall()
        with soon(), process_driver.worker(session_id, client_id=ME) as new:
            assert new.contribution is None
            came = take(new, 1, GRADIENT, DIGEST)
            assert not came.result.replayed
            assert_same(came.parameters, {"large": -GRADIENT["large"]})
    process_driver.delete(session_id)


def test_a_client_that_has_not_read_an_answer_gets_it_on_its_next_stream(
    process_driver: StubDriver,
) -> None:
    session_id = _large_session(process_driver)
    with raw_stream(process_driver, session_id, ME) as old:
        old.begin(1, DIGEST)
        old.chunks(list(chunks_of(GRADIENT.values())))
        old.end()
        old.receive()  # The answer has begun; the rest of it is not read.
        with soon(), process_driver.worker(session_id, client_id=ME) as new:
            assert new.contribution == pb.Contribution(step=1, digest=DIGEST, applied=True)
            again = take(new, 1, GRADIENT, DIGEST)
            assert again.result.replayed
            assert_same(again.parameters, {"large": -GRADIENT["large"]})
            # The answer that nobody reads held the parameters: nobody waits for it any more.
            assert take(new, 2, GRADIENT, b"next").result.step == 2
        with refused("SEAT_TAKEN_OVER"):
            old.answer()
    process_driver.delete(session_id)


def test_a_client_whose_connection_is_cut_is_never_told_that_it_is_busy(
    process_driver: StubDriver, wire: Relay
) -> None:
    session_id = create(process_driver, spec(SGD(lr=1)))
    for step in range(1, 21):
        with StubDriver(wire.address) as mine, raw_stream(mine, session_id, ME) as stream:
            assert stream.status.steps == step - 1
            stream.step(step, list(gradients(step).values()))
            stream.begin(step + 1)
            wire.cut()
    assert process_driver.get(session_id).status.steps == 20


def test_while_the_server_drains_no_seat_is_taken_over() -> None:
    with ground() as where, raw_stream(where.driver, where.session_id, ME) as old:
        old.begin(STEPS + 1, DIGEST)
        old.chunks(list(chunks_of(gradients(1).values())))
        time.sleep(0.1)  # Until the step is under way.
        EventLoopThread().call(where.registry.drain)
        with refused("DRAINING"), where.driver.worker(where.session_id, client_id=ME):
            pass
        old.end()
        answer = old.answer()
        assert answer.result is not None
        assert answer.result.step == STEPS + 1
