"""What survives: of every mode what it promises, bit for bit, and nothing that was not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from drivers import reopened, take
from event_loop import TIMEOUT_S
from faults.disks import MemoryDisk
from faults.durable import (
    FSYNC,
    JOURNAL,
    DurableServer,
    durable_server,
    durable_spec,
    see,
    snapshots,
    stepped,
)
from faults.ground import Mistakes, ground
from refusals import refused
from scenarios.models import gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD, Adam, Optimizer
from optserve.v1.session_pb2 import Durability, DurabilityMode, LossPoint, SessionState, Split
from optserve_server.core.limits import Limits

STEPS = 3
"""How many steps a course has."""


def course(server: DurableServer, session_id: str) -> Iterator[str]:
    """Change a session in every way; yield what has been changed, after it was acknowledged."""
    driver = server.driver
    with driver.worker(session_id) as worker:
        for step in range(1, STEPS):
            take(worker, step, gradients(step))
            yield "step"
        driver.end_epoch(session_id, 1)
        yield "epoch"
        driver.evaluate(session_id, torch.eye(4), torch.arange(4), split=Split.SPLIT_TRAIN)
        yield "loss"
        changed = Optimizer(adam=Adam(lr=0.3, betas=[0.7, 0.8]))
        driver.update(
            pb.UpdateSessionRequest(session_id=session_id, optimizer=changed, display_name="new")
        )
        yield "spec"
        driver.upload(session_id, {"b": torch.ones(5)})
        yield "parameters"
        take(worker, STEPS, {"w": gradients(STEPS)["w"]})
        yield "step without a gradient for each parameter"


@pytest.mark.parametrize("fsync", [False, True], ids=["killed", "unplugged"])
def test_a_journal_keeps_all_that_was_acknowledged(*, fsync: bool) -> None:
    disks = []
    with durable_server() as server:
        wanted = durable_spec(FSYNC if fsync else JOURNAL)
        session_id = server.driver.create(wanted, model()).status.session_id
        for change in course(server, session_id):
            seen = see(server.driver, session_id)
            assert seen.session.status.durable_steps == seen.session.status.steps
            disks.append((change, seen, server.unplugged() if fsync else server.killed()))
        expected = stepped(server.driver, session_id, STEPS + 1, STEPS + 3)
    for change, seen, disk in disks:
        with durable_server(disk) as server:
            assert see(server.driver, session_id) == seen, change
    with durable_server(disks[-1][2]) as server:
        assert stepped(server.driver, session_id, STEPS + 1, STEPS + 3) == expected


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_snapshots_lose_no_more_steps_than_was_agreed_and_say_how_many_are_safe(steps: int) -> None:
    last = 12
    after: list[dict[str, bytes]] = []
    disks = []
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(snapshots(steps)), model()).status.session_id
        after.append(see(server.driver, session_id).parameters)
        for step in range(1, last + 1):
            after.append(stepped(server.driver, session_id, step, step))
            safe = server.driver.get(session_id).status.durable_steps
            assert step - safe <= steps
            disks.append((step, safe, server.unplugged()))
    for step, safe, disk in disks:
        with durable_server(disk) as server:
            status = server.driver.get(session_id).status
            assert safe <= status.steps <= step
            assert status.durable_steps == status.steps
            assert see(server.driver, session_id).parameters == after[status.steps]
            stepped(server.driver, session_id, status.steps + 1, last)
            assert see(server.driver, session_id).parameters == after[last]


def test_a_snapshot_is_taken_after_its_time_however_few_steps_there_are() -> None:
    with durable_server() as server:
        wanted = durable_spec(snapshots(1000, seconds=0.05))
        session_id = server.driver.create(wanted, model()).status.session_id
        stepped(server.driver, session_id, 1, 1)
        server.driver.evaluate(session_id, torch.eye(4), torch.arange(4), split=Split.SPLIT_TRAIN)
        while server.driver.get(session_id).status.durable_steps < 1:
            pass  # A test that hangs has a timeout.
        points = see(server.driver, session_id).points
        while not _restored_points(disk := server.killed(), session_id):
            pass
    assert _restored_points(disk, session_id) == points


def _restored_points(disk: MemoryDisk, session_id: str) -> list[LossPoint]:
    with durable_server(disk) as server:
        return see(server.driver, session_id).points


@pytest.mark.parametrize("durability", [JOURNAL, snapshots(1000)], ids=["journal", "snapshots"])
def test_a_graceful_stop_loses_nothing(durability: Durability) -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(durability), model()).status.session_id
        for _ in course(server, session_id):
            seen = see(server.driver, session_id)
        disk = server.disk
    disk.lose_power()
    with durable_server(disk) as server:
        came = see(server.driver, session_id)
        came.session.status.durable_steps = seen.session.status.durable_steps
        assert came == seen


def test_a_server_that_is_killed_answers_the_last_step_again_and_knows_other_content() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        with server.driver.worker(session_id) as worker:
            first = worker.start(1, gradients(1), digest=b"first").result()
        disk = server.killed()
    with durable_server(disk) as server, reopened(server.driver, session_id) as worker:
        again = worker.start(1, gradients(1), digest=b"first").result()
        assert again.result.replayed
        again.result.replayed = False
        assert again.result == first.result
        with refused("STEP_CONFLICT", field="digest"):
            worker.start(1, gradients(2), digest=b"other").result()
        found = server.driver.stub.GetContribution(pb.GetContributionRequest(session_id=session_id))
        assert found.contribution == pb.Contribution(step=1, digest=b"first", applied=True)


def test_the_request_that_made_a_session_is_known_after_a_restart() -> None:
    wanted = durable_spec(JOURNAL)
    with durable_server() as server:
        made = server.driver.create(wanted, model(), request_id="mine")
        disk = server.killed()
    with durable_server(disk) as server:
        again = server.driver.create(wanted, model(), request_id="mine")
        assert again.status.session_id == made.status.session_id
        with refused("REQUEST_CONFLICT", field="request_id"):
            server.driver.create(wanted, request_id="mine")


def test_a_session_is_durable_with_its_values_or_not_there() -> None:
    with durable_server() as server:
        server.driver.create(durable_spec(snapshots(1000)), model())
        disk = server.unplugged()
    with durable_server(disk) as server:
        (found,) = server.driver.sessions().sessions
        assert server.driver.get(found.session_id).status.state == SessionState.SESSION_STATE_READY


def test_sessions_in_memory_only_are_not_on_disk() -> None:
    with durable_server() as server:
        server.driver.create(spec(SGD()), model())
        disk = server.killed()
    with durable_server(disk) as server:
        assert not server.driver.sessions().sessions


def test_what_is_deleted_stays_deleted() -> None:
    with durable_server() as server:
        session_ids = [
            server.driver.create(durable_spec(each), model()).status.session_id
            for each in (JOURNAL, snapshots(1))
        ]
        for session_id in session_ids:
            stepped(server.driver, session_id, 1, 2)
            server.driver.delete(session_id)
        assert server.registry.budget.reserved_bytes == 0
        disk = server.unplugged()
    with durable_server(disk) as server:
        assert not server.driver.sessions().sessions


def test_a_journal_is_replaced_by_a_snapshot_before_it_is_too_large() -> None:
    most = 1 << 20
    parameters = {"w": torch.zeros(20_000)}  # 80 KB: a dozen steps.
    with durable_server(limits=Limits(journal_bytes_max=most)) as server:
        wanted = spec(SGD(lr=0.1), parameters=parameters)
        wanted.durability.CopyFrom(JOURNAL)
        session_id = server.driver.create(wanted, parameters).status.session_id
        with server.driver.worker(session_id) as worker:
            for step in range(1, 101):
                take(worker, step, {"w": torch.full((20_000,), float(step))})
        written = server.disk.used_bytes
        last = server.driver.download(session_id)["w"]
        disk = server.killed()
    assert written < 8 * most  # A journal for each of two snapshots, twice as long at the most.
    with durable_server(disk) as server:
        assert torch.equal(server.driver.download(session_id)["w"], last)


def test_changes_without_tensors_fill_no_disk_either() -> None:
    most, name = 1 << 15, "n" * 250  # A change of the name writes down the whole spec.
    with durable_server(limits=Limits(journal_bytes_max=most)) as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        first = server.disk.used_bytes
        for number in range(400):
            request = pb.UpdateSessionRequest(session_id=session_id, display_name=f"{number}{name}")
            server.driver.update(request)
        written = server.disk.used_bytes - first
        disk = server.killed()
    assert written < 8 * most  # As above.
    with durable_server(disk) as server:
        assert server.driver.get(session_id).spec.display_name == f"399{name}"


def test_memory_of_a_change_is_counted_though_its_caller_has_gone() -> None:
    with durable_server() as server:
        wanted = spec(SGD(lr=0.1))
        wanted.durability.CopyFrom(JOURNAL)
        session_id = server.driver.create(wanted, model()).status.session_id
        before = server.driver.get(session_id).status.reserved_bytes
        writing, go = threading.Event(), threading.Event()

        def wait(operation: str) -> None:
            if operation.startswith("create ") and not writing.is_set():
                writing.set()
                assert go.wait(TIMEOUT_S)

        server.disk.before = wait
        momentum = Optimizer(sgd=SGD(momentum=0.9))
        call = server.driver.stub.UpdateSession.future(
            pb.UpdateSessionRequest(session_id=session_id, optimizer=momentum)
        )
        assert writing.wait(TIMEOUT_S)
        call.cancel()
        time.sleep(0.1)  # Until the server has heard of it.
        go.set()
        server.driver.download(session_id)  # Between two changes.
        reserved_bytes = server.driver.get(session_id).status.reserved_bytes
        assert server.registry.budget.reserved_bytes == reserved_bytes > before


def test_durability_of_a_server_without_a_disk_is_refused() -> None:
    with ground() as where, Mistakes(where).refused("NO_STORAGE", "spec.durability.mode"):
        where.driver.create(durable_spec(JOURNAL))


@pytest.mark.parametrize(
    ("durability", "field"),
    [
        pytest.param(Durability(snapshot_steps=3), "mode", id="snapshots of nothing"),
        pytest.param(Durability(fsync=True), "fsync", id="fsync of nothing"),
        pytest.param(
            Durability(mode=DurabilityMode.DURABILITY_MODE_SNAPSHOT, fsync=True),
            "fsync",
            id="fsync of snapshots",
        ),
        pytest.param(snapshots(1, seconds=-1.0), "snapshot_s", id="a negative time"),
        pytest.param(snapshots(1, seconds=float("nan")), "snapshot_s", id="no time"),
        pytest.param(Durability(mode=9), "mode", id="an unknown mode"),  # type: ignore[arg-type]
    ],
)
def test_durability_that_makes_no_sense_is_refused(durability: Durability, field: str) -> None:
    with durable_server() as server:
        with refused("INVALID_FIELD", field=f"spec.durability.{field}"):
            server.driver.create(durable_spec(durability))
        assert not server.driver.sessions().sessions


def test_what_is_in_force_says_how_often_snapshots_are_taken() -> None:
    with durable_server() as server:
        wanted = Durability(mode=DurabilityMode.DURABILITY_MODE_SNAPSHOT)
        in_force = server.driver.create(durable_spec(wanted)).spec.durability
        assert in_force.snapshot_steps > 0
        assert in_force.snapshot_s > 0
        again = server.driver.create(durable_spec(in_force)).spec.durability
        assert again == in_force


def test_a_session_without_room_for_a_copy_of_it_is_saved_all_the_same() -> None:
    with durable_server() as server:
        count = server.driver.create(durable_spec(snapshots(2)), model()).status.reserved_bytes
    with durable_server(limits=Limits(memory_bytes_max=count + 100)) as server:
        session_id = server.driver.create(durable_spec(snapshots(2)), model()).status.session_id
        stepped(server.driver, session_id, 1, 9)
        assert server.driver.get(session_id).status.durable_steps >= 7
        assert server.registry.budget.reserved_bytes == count


@pytest.mark.parametrize("limit", ["memory_bytes_max", "tenant_bytes_max"])
@pytest.mark.parametrize("has_room", [True, False])
def test_the_copy_that_a_snapshot_takes_is_reserved(limit: str, *, has_room: bool) -> None:
    with durable_server() as server:
        count = server.driver.create(durable_spec(snapshots(2)), model()).status.reserved_bytes
    with durable_server(limits=Limits(**{limit: count + (count if has_room else 100)})) as server:
        session_id = server.driver.create(durable_spec(snapshots(2)), model()).status.session_id
        during = []

        def note(operation: str) -> None:
            if operation.startswith("make "):
                during.append(server.registry.budget.reserved_bytes)

        server.disk.before = note
        stepped(server.driver, session_id, 1, 3)
        assert (max(during) > count) == has_room


def test_a_server_says_whether_sessions_may_survive_it() -> None:
    with durable_server() as server, ground() as without:
        asked = pb.GetServerInfoRequest()
        assert "durability" in server.driver.stub.GetServerInfo(asked).features
        assert "durability" not in without.driver.stub.GetServerInfo(asked).features
