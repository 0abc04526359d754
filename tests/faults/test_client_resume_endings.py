"""Connections that do not come back, and servers that come back with less: what the client says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from event_loop import TIMEOUT_S
from faces import Connect, connecting
from relay import Relay, relay
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve_client import ClientConfig, Retry, aio
from optserve_client._effects import Operation
from optserve_client._exchange import Opening, TrainAnswer
from optserve_client._session_operations import SessionOperations

SGD = optserve.optim.SGD(lr=0.5)
ONES = np.ones(3, np.float32)
HUGE = np.full(3, 2.0**127, np.float32)  # Finite, and the sum of two is not.
LARGE = np.ones(1 << 20, np.float32)
NOBODY = "127.0.0.1:1"
BRIEF = Retry(give_up_after_s=0.5, backoff_s=0.01, backoff_max_s=0.1)


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Relay]:
    with relay(server.address) as wire:
        yield wire


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param, ClientConfig(lane="grpc", retry=BRIEF)) as connect:
        yield connect


@contextlib.contextmanager
def cut_for_good_soon(wire: Relay) -> Iterator[None]:
    """Close the wire a moment after the block has begun."""
    timer = threading.Timer(0.2, wire.close)
    timer.start()
    yield
    timer.join()


def test_a_step_that_could_not_be_sent_is_unavailable_after_a_bounded_time(
    connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with (
        connect(wire.address, progress=False) as client,
        optserve.connect(server.address) as keeper,
    ):
        session = client.create_session({"w": ONES}, optimizer=SGD)
        wire.close()
        for call in (session.status, lambda: session.step({"w": ONES})):
            began_s = time.monotonic()
            with pytest.raises(optserve.UnavailableError):
                call()
            assert 0.3 < time.monotonic() - began_s < 10
        assert keeper.delete_session(session.session_id).steps == 0


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_step_without_an_answer_is_unknown_until_asked_for(
    via: optserve.Via, connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with connect(wire.address, progress=False) as client, connect(server.address) as keeper:
        session = client.create_session({"w": ONES}, optimizer=SGD, workers=2, via=via)
        with cut_for_good_soon(wire), pytest.raises(optserve.StepUnknownError) as caught:
            session.step({"w": ONES})
        assert (caught.value.step, caught.value.code) == (1, "UNAVAILABLE")

        mine = keeper.join_session(session.session_id, worker=0)
        found = mine.contribution()
        if via == "stream":  # What came in one call went with the call.
            assert (found.step, found.digest) == (1, caught.value.digest)
        assert (found.applied, found.result, found.steps) == (False, None, 0)
        with ThreadPoolExecutor() as threads, optserve.connect(server.address) as third:
            other = third.join_session(session.session_id, worker=1)
            pending = threads.submit(other.step, {"w": 3 * ONES})
            result = mine.step({"w": ONES})  # Only what makes the step complete is missing.
            assert pending.result(TIMEOUT_S).step == result.step == 1
        found = mine.contribution()
        assert (found.step, found.applied, found.steps) == (1, True, 1)
        assert found.result is not None
        assert found.result.gradient_norm == result.gradient_norm
        assert mine.parameters["w"].tolist() == [0.0] * 3
        mine.delete()


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_who_takes_the_place_of_a_worker_waits_for_the_step_that_it_has_sent(
    via: optserve.Via, connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with connect(wire.address, progress=False) as client, connect(server.address) as keeper:
        session = client.create_session({"w": ONES}, optimizer=SGD, workers=2)
        with cut_for_good_soon(wire), pytest.raises(optserve.StepUnknownError):
            session.step({"w": ONES})
        heir = keeper.join_session(session.session_id, worker=0, via=via)
        with pytest.raises(optserve.StepConflictError):
            heir.step({"w": 7 * ONES})
        with optserve.connect(server.address) as third:
            other = third.join_session(session.session_id, worker=1)
            timer = threading.Timer(0.3, other.step, [{"w": 3 * ONES}])
            timer.start()
            parameters = heir.resume()
            assert (parameters.steps, heir.steps) == (1, 1)
            assert parameters["w"].tolist() == [0.0] * 3
            timer.join()
        heir.delete()


def give_up(other: optserve.Session) -> None:
    """Bring a gradient to the open round with which it comes to nothing."""
    with pytest.raises(optserve.NonFiniteGradientError):
        other.step({"w": HUGE})


@pytest.mark.parametrize("lane", ["grpc", "shm"])
@pytest.mark.parametrize("place", ["own", "shared"])
def test_a_step_whose_round_is_given_up_just_when_it_is_asked_for_is_sent_again(
    lane: optserve.Lane,
    place: str,
    wire: Relay,
    server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ClientConfig(lane=lane, retry=BRIEF)
    with (
        ThreadPoolExecutor() as threads,
        optserve.connect(wire.address, config=config, progress=False) as client,
        optserve.connect(server.address) as keeper,
        client.create_session({"w": ONES}, optimizer=SGD, workers=2) as session,
    ):
        other = keeper.join_session(session.session_id, worker=1)
        gradients = dict(session.gradient_buffers()) if place == "shared" else {"w": HUGE.copy()}
        gradients["w"][:] = HUGE
        mine = threads.submit(session.step, gradients)
        while not keeper.join_session(session.session_id).contribution().step:
            time.sleep(0.01)
        receive = Opening.receive

        def hear(opening: Opening, response: TrainAnswer) -> bool:
            monkeypatch.undo()
            give_up(other)
            return receive(opening, response)

        monkeypatch.setattr(Opening, "receive", hear)
        wire.cut()
        if (lane, place) == ("shm", "shared"):  # Their sum was calculated in their place.
            with pytest.raises(optserve.StepsLostError) as caught:
                mine.result(TIMEOUT_S)
            assert (caught.value.resumes_from, caught.value.lost) == (1, 0)
            assert session.resume().steps == 0
        else:
            assert other.step({"w": ONES}).step == mine.result(TIMEOUT_S).step == 1
            assert session.parameters["w"].tolist() == [-(2.0**125)] * 3  # Ones are lost in it.


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_who_waits_for_a_step_that_is_given_up_goes_on_from_where_the_session_stands(
    via: optserve.Via, wire: Relay, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ClientConfig(lane="grpc", retry=BRIEF)
    with (
        optserve.connect(wire.address, config=config, progress=False) as client,
        optserve.connect(server.address) as keeper,
    ):
        session = client.create_session({"w": ONES}, optimizer=SGD, workers=2)
        with cut_for_good_soon(wire), pytest.raises(optserve.StepUnknownError):
            session.step({"w": HUGE})
        heir = keeper.join_session(session.session_id, worker=0, via=via)
        other = keeper.join_session(session.session_id, worker=1)
        contribution = SessionOperations.contribution

        def hear(operations: SessionOperations) -> Operation[optserve.Contribution]:
            found = yield from contribution(operations)
            threads.submit(give_up, other).result(TIMEOUT_S)
            return found

        monkeypatch.setattr(SessionOperations, "contribution", hear)
        with ThreadPoolExecutor() as threads:
            parameters = heir.resume()
        assert (parameters.steps, parameters["w"].tolist()) == (0, [1.0] * 3)
        heir.delete()


def test_who_resumes_goes_on_from_where_the_session_stands(
    connect: Connect, server: ServerProcess
) -> None:
    with connect(server.address) as client, connect(server.address) as other_client:
        session = client.create_session({"w": ONES}, optimizer=SGD)
        late = other_client.join_session(session.session_id)
        for _ in range(3):
            session.step({"w": ONES})
        session.end_epoch()
        session.close()
        with pytest.raises(optserve.StepConflictError):
            late.step({"w": 9 * ONES}, step=3)
        assert late.resume().steps == late.steps == 3
        assert late.epochs == 1
        assert late.step({"w": ONES}).step == 4
        late.delete()


def test_a_session_that_its_server_has_forgotten_is_not_found(server: ServerProcess) -> None:
    with (
        running_server() as forgetful,
        relay(forgetful.address) as wire,
        optserve.connect(wire.address, progress=False) as client,
    ):
        session = client.create_session({"w": ONES}, optimizer=SGD)
        session.step({"w": ONES})
        wire.retarget(server.address)  # As if it had been started again.
        wire.cut()
        with pytest.raises(optserve.SessionNotFoundError):
            session.step({"w": ONES})


def test_an_outage_is_told_once_and_so_is_its_end(
    wire: Relay, server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "optserve_client")
    patient = ClientConfig(lane="grpc", retry=Retry(backoff_s=0.01, backoff_max_s=0.1))
    with (
        optserve.connect(wire.address, config=patient, progress=False) as client,
        client.create_session({"w": ONES}, optimizer=SGD) as session,
        ThreadPoolExecutor() as threads,
    ):
        session.step({"w": ONES})
        assert not caplog.records
        wire.retarget(NOBODY)
        wire.cut()
        calls = [client.server_info, client.catalogue, lambda: session.step({"w": ONES})]
        pending = [threads.submit(call) for call in calls]
        time.sleep(0.5)
        assert not any(each.done() for each in pending)
        wire.retarget(server.address)
        for each in pending:
            each.result(TIMEOUT_S)
    levels = [(record.levelname, wire.address in record.message) for record in caplog.records]
    assert levels == [("WARNING", True), ("INFO", True)]


def test_what_waits_to_try_again_ends_when_the_client_is_closed(
    wire: Relay, server: ServerProcess
) -> None:
    client = optserve.connect(wire.address, progress=False)
    session = client.create_session({"w": ONES}, optimizer=SGD)
    wire.retarget(NOBODY)
    wire.cut()
    with ThreadPoolExecutor() as threads:
        pending = [threads.submit(call) for call in (client.server_info, session.status)]
        time.sleep(0.3)
        client.close()
        for each in pending:
            with pytest.raises(optserve.ClosedError):
                each.result(5)
    with optserve.connect(server.address) as keeper:
        keeper.delete_session(session.session_id)


def test_what_waits_to_try_again_ends_when_its_task_is_cancelled(
    wire: Relay, server: ServerProcess
) -> None:
    async def play() -> str:
        async with aio.connect(wire.address, progress=False) as client:
            session = await client.create_session({"w": ONES}, optimizer=SGD)
            wire.retarget(NOBODY)
            wire.cut()
            calls = [client.server_info(), session.step({"w": ONES})]
            tasks = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0.3)
            for task in tasks:
                task.cancel()
            began_s = time.monotonic()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began_s < 5
            assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
            return session.session_id

    session_id = asyncio.run(play())
    with optserve.connect(server.address) as keeper:
        keeper.delete_session(session_id)


def test_ctrl_c_ends_what_waits_to_try_again() -> None:
    script = """
        import sys, numpy as np, optserve_client as optserve
        ones, sgd = np.ones(3), optserve.optim.SGD(lr=0.5)
        with optserve.connect(sys.argv[1], progress=False) as client:
            with client.create_session({"w": ones}, optimizer=sgd) as session:
                session.step({"w": ones})
                print("stepped", flush=True)
                sys.stdin.readline()
                session.step({"w": ones})
    """
    with running_server() as server:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script), server.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "stepped\n"
        server.process.kill()
        server.process.wait()
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGINT
        assert "trying again for up to 120 s" in stderr.splitlines()[0]
        assert stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_two_of_one_client_do_not_take_each_others_seat(server: ServerProcess) -> None:
    with (
        optserve.connect(server.address) as client,
        client.create_session({"w": ONES}, optimizer=SGD) as session,
    ):
        session.step({"w": ONES})
        with pytest.raises(optserve.WorkerBusyError):
            client.join_session(session.session_id).step({"w": ONES})
        assert session.step({"w": ONES}).step == 2


def test_a_server_that_is_not_reached_any_more_is_noticed(connect: Connect, wire: Relay) -> None:
    config = ClientConfig(lane="grpc", keepalive_s=0.5, retry=Retry(backoff_s=0.01))
    with (
        connect(wire.address, config=config, progress=False) as client,
        client.create_session({"w": LARGE}, optimizer=SGD) as session,
    ):
        for step in range(1, 4):
            session.step({"w": LARGE})
            wire.stall()
            began_s = time.monotonic()
            assert session.status().steps == step
            assert time.monotonic() - began_s < 10
        assert session.step({"w": LARGE}).step == 4
