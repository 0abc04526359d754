"""Idle sessions lie on disk: they take no memory, are listed, and come back when called."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drivers import reopened
from event_loop import TIMEOUT_S
from faults.durable import (
    JOURNAL,
    DurableServer,
    durable_server,
    durable_spec,
    see,
    snapshots,
    stepped,
)
from refusals import RefusedError, refused
from scenarios.models import gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.session_pb2 import Durability, SessionState
from optserve_server.core.errors import SessionNotFoundError
from optserve_server.core.limits import Limits

PARKED = SessionState.SESSION_STATE_PARKED


def _created(server: DurableServer, durability: Durability = JOURNAL, *, workers: int = 0) -> str:
    wanted = durable_spec(durability, workers=workers)
    return server.driver.create(wanted, model()).status.session_id


def _park(server: DurableServer) -> list[str]:
    """Park whatever nobody uses at this moment."""
    return server.loop.run(server.registry.park_idle(0.0))


def _states(server: DurableServer) -> dict[str, SessionState.ValueType]:
    return {each.session_id: each.state for each in server.driver.sessions().sessions}


@pytest.mark.parametrize("durability", [JOURNAL, snapshots(1000)], ids=["journal", "snapshots"])
def test_a_parked_session_takes_no_memory_and_comes_back_as_it_was(durability: Durability) -> None:
    with durable_server() as server:
        session_id = _created(server, durability)
        stepped(server.driver, session_id, 1, 3)
        seen, (before,) = see(server.driver, session_id), server.driver.sessions().sessions
        assert _park(server) == [session_id]
        assert server.registry.budget.reserved_bytes == 0
        (listed,) = server.driver.sessions().sessions
        before.state, before.durable_steps = PARKED, before.steps
        assert listed == before
        came = see(server.driver, session_id)
        came.session.status.durable_steps = seen.session.status.durable_steps
        assert came == seen
        assert server.registry.budget.reserved_bytes == seen.session.status.reserved_bytes
        assert _park(server) == [session_id]
        stepped(server.driver, session_id, 4, 6)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda d, i: d.get(i), id="get"),
        pytest.param(lambda d, i: d.download(i), id="download"),
        pytest.param(lambda d, i: d.upload(i, model()), id="upload"),
        pytest.param(lambda d, i: d.end_epoch(i, 1), id="end-epoch"),
        pytest.param(lambda d, i: stepped(d, i, 2, 2), id="train"),
        pytest.param(
            lambda d, i: d.update(pb.UpdateSessionRequest(session_id=i, display_name="new")),
            id="update",
        ),
        pytest.param(
            lambda d, i: d.loss_points(pb.ListLossPointsRequest(session_id=i)), id="history"
        ),
    ],
)
def test_every_call_brings_a_parked_session_back(call: object) -> None:
    assert callable(call)
    with durable_server() as server:
        session_id = _created(server)
        stepped(server.driver, session_id, 1, 1)
        _park(server)
        call(server.driver, session_id)
        assert _states(server) == {session_id: SessionState.SESSION_STATE_READY}


def test_many_calls_at_once_bring_a_session_back_once() -> None:
    with durable_server() as server, ThreadPoolExecutor(8) as pool:
        session_id = _created(server)
        stepped(server.driver, session_id, 1, 2)
        expected = see(server.driver, session_id)
        for _ in range(5):
            _park(server)
            seen = list(pool.map(lambda _: see(server.driver, session_id), range(8)))
            assert seen == [expected] * 8
        assert server.registry.budget.reserved_bytes == expected.session.status.reserved_bytes


def test_a_parked_session_is_deleted_without_coming_back() -> None:
    with durable_server() as server:
        session_id = _created(server)
        stepped(server.driver, session_id, 1, 2)
        _park(server)
        status = server.driver.delete(session_id)
        assert (status.state, status.steps) == (PARKED, 2)
        with refused("SESSION_NOT_FOUND", field="session_id"):
            server.driver.get(session_id)
        disk = server.killed()
    with durable_server(disk) as server:
        assert not _states(server)


def test_a_session_for_which_there_is_no_room_stays_parked_until_there_is() -> None:
    with durable_server() as server:
        session_id = _created(server)
        stepped(server.driver, session_id, 1, 2)
        count = server.driver.get(session_id).status.reserved_bytes
        disk = server.killed()
    with durable_server(disk, Limits(memory_bytes_max=count + count // 2)) as server:
        other = server.driver.create(spec(SGD()), model()).status.session_id
        with pytest.raises(RefusedError) as caught:
            server.driver.get(session_id)
        assert (caught.value.reason, caught.value.field) == ("MEMORY_EXHAUSTED", "session_id")
        assert caught.value.retry_after_s is not None
        assert _states(server)[session_id] == PARKED
        server.driver.delete(other)
        assert server.driver.get(session_id).status.steps == 2


def test_a_session_that_has_grown_since_its_snapshot_comes_back_once_there_is_room() -> None:
    wanted = spec(SGD(lr=0.1), parameters={"w": torch.ones(10_000)})
    wanted.durability.CopyFrom(JOURNAL)
    momentum = Optimizer(sgd=SGD(momentum=0.9))
    with durable_server() as server:
        driver = server.driver
        session_id = driver.create(wanted, {"w": torch.ones(10_000)}).status.session_id
        before = driver.get(session_id).status.reserved_bytes
        driver.update(pb.UpdateSessionRequest(session_id=session_id, optimizer=momentum))
        after = driver.get(session_id).status.reserved_bytes
        disk = server.killed()
    with durable_server(disk, Limits(memory_bytes_max=after - 1)) as server:
        for _ in range(2):
            with refused("MEMORY_EXHAUSTED", field="session_id"):
                server.driver.get(session_id)
            assert _states(server) == {session_id: PARKED}
            assert server.registry.budget.reserved_bytes == 0
        disk = server.killed()
    with durable_server(disk, Limits(memory_bytes_max=after)) as server:
        assert server.driver.get(session_id).status.reserved_bytes == after > before
        assert server.registry.budget.reserved_bytes == after


def test_what_changes_while_it_is_saved_is_not_parked_without_the_change() -> None:
    with durable_server() as server, ThreadPoolExecutor(1) as pool:
        session_id = _created(server, snapshots(1000))
        stepped(server.driver, session_id, 1, 1)
        writing, go = threading.Event(), threading.Event()

        def wait(operation: str) -> None:
            if operation.startswith("make ") and not writing.is_set():
                writing.set()
                assert go.wait(TIMEOUT_S)

        server.disk.before = wait
        parking = pool.submit(_park, server)
        assert writing.wait(TIMEOUT_S)
        stepped(server.driver, session_id, 2, 2)
        go.set()
        assert parking.result(TIMEOUT_S) == []
        assert server.driver.get(session_id).status.steps == 2
        assert _park(server) == [session_id]
        stepped(server.driver, session_id, 3, 3)


def test_a_session_is_not_parked_under_a_call_that_waits_until_it_is_saved() -> None:
    with durable_server() as server, ThreadPoolExecutor(2) as pool:
        session_id = _created(server, snapshots(1000))
        stepped(server.driver, session_id, 1, 1)
        # No room for a copy: the session is held while it is written.
        budget = server.registry.budget
        free = server.registry.limits.memory_bytes_max - budget.reserved_bytes
        server.loop.call(lambda: budget.reserve(free, what="a test", field=""))
        writing, go = threading.Event(), threading.Event()

        def wait(operation: str) -> None:
            if operation.startswith("make ") and not writing.is_set():
                writing.set()
                assert go.wait(TIMEOUT_S)

        server.disk.before = wait
        parking = pool.submit(_park, server)
        assert writing.wait(TIMEOUT_S)
        request = pb.UpdateSessionRequest(session_id=session_id, display_name="new")
        update = pool.submit(server.driver.update, request)
        lock = server.loop.run(server.registry.of("").find(session_id)).work.lock
        while not server.loop.call(lambda: len(lock._waiters)):
            time.sleep(0.001)
        go.set()
        assert update.result(TIMEOUT_S).spec.display_name == "new"
        assert parking.result(TIMEOUT_S) == []
        assert server.driver.get(session_id).spec.display_name == "new"


def test_what_is_in_use_or_waits_for_others_or_is_in_memory_only_is_not_parked() -> None:
    with durable_server() as server:
        used, waiting, alone = _created(server), _created(server, workers=2), _created(server)
        in_memory = server.driver.create(spec(SGD()), model()).status.session_id
        with server.driver.worker(used):
            with server.driver.worker(waiting) as worker:
                contribution = worker.start(1, gradients(1))
                _until_contributed(server, waiting)
                worker.abandon()
            assert contribution.exception(TIMEOUT_S)
            assert _park(server) == [alone]
        assert _states(server)[in_memory] == SessionState.SESSION_STATE_READY
        with reopened(server.driver, waiting, 1) as second:  # The first one's is still there.
            answer = second.start(1, gradients(2)).result(TIMEOUT_S)
        assert answer.result.step == 1


def _until_contributed(server: DurableServer, session_id: str) -> None:
    request = pb.GetContributionRequest(session_id=session_id)
    while not server.driver.stub.GetContribution(request, timeout=TIMEOUT_S).HasField(
        "contribution"
    ):
        pass


def test_a_failed_session_is_as_it_was_before_once_it_has_been_parked() -> None:
    with durable_server() as server:
        session_id = _created(server)
        stepped(server.driver, session_id, 1, 2)
        seen = see(server.driver, session_id)
        actor = server.loop.run(server.registry.of("").find(session_id))
        server.loop.call(lambda: setattr(actor.session, "failed", True))
        with refused("SESSION_FAILED"):
            stepped(server.driver, session_id, 3, 3)
        assert _park(server) == [session_id]
        assert see(server.driver, session_id) == seen


def test_what_has_been_parked_for_long_is_deleted_and_what_is_in_memory_only_sooner() -> None:
    with durable_server() as server:
        _created(server)
        server.driver.create(spec(SGD()), model())
        _park(server)
        registry = server.registry
        assert server.loop.run(registry.expire_idle(3600.0, 0.0))
        assert len(_states(server)) == 1
        assert server.loop.run(registry.expire_idle(0.0, 3600.0))
        assert not _states(server)


def test_a_parked_session_is_there_for_its_tenant_and_for_no_other() -> None:
    with durable_server() as server:
        registry, loop = server.registry, server.loop
        session_id = _created(server)
        _park(server)
        other = registry.of("other")
        assert not loop.run(other.page(after=0, count=10))[0]
        for call in (other.find, other.delete):
            with pytest.raises(SessionNotFoundError):
                loop.run(call(session_id))
        assert _states(server) == {session_id: PARKED}
