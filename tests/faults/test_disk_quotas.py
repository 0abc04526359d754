"""What a tenant has on disk is bounded: beyond it its changes are refused, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from drivers import reopened, take
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.checkpointing import Checkpoints
from faults.disks import MemoryDisk
from faults.durable import JOURNAL, DurableServer, durable_server, see, snapshots
from messages import bytes_of
from refusals import RefusedError, refused
from scenarios.models import spec

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import Durability
from optserve_server.core.limits import Limits

_T = TypeVar("_T")

VALUES = {"w": torch.ones(10_000)}
SIZE = VALUES["w"].nbytes  # Of a snapshot, and of a record.
QUOTA = Limits(tenant_disk_bytes_max=10 * SIZE)


def _created(driver: StubDriver, durability: Durability = JOURNAL) -> str:
    wanted = spec(SGD(lr=0.1), parameters=VALUES)
    wanted.durability.CopyFrom(durability)
    return driver.create(wanted, VALUES).status.session_id


def _step(driver: StubDriver, session_id: str, step: int) -> bytes:
    with reopened(driver, session_id) as worker:
        gradients = {"w": torch.full_like(VALUES["w"], 1 / step)}
        return bytes_of(take(worker, step, gradients).parameters["w"])


def _filled(server: DurableServer) -> list[str]:
    """Create sessions for as long as there is room."""
    created, error = _until_refused(lambda _: _created(server.driver, snapshots(1000)))
    assert (error.reason, error.field) == ("STORAGE_FULL", "spec.durability")
    assert "the only tenant has" in error.message
    assert error.expected.startswith("at most")
    assert error.actual.endswith("bytes")
    assert error.retry_after_s is not None
    return created


def _until_refused(act: Callable[[int], _T]) -> tuple[list[_T], RefusedError]:
    """Do something for as long as it is not refused; return what came of it, and the refusal."""
    done: list[_T] = []
    while len(done) < 100:
        try:
            done.append(act(len(done)))
        except RefusedError as error:
            return done, error
    raise AssertionError("it is never refused")


def _watched(disk: MemoryDisk) -> list[int]:
    """Return how much is on the disk at each operation from now on."""
    sizes: list[int] = []
    disk.before = lambda _: sizes.append(disk.used_bytes)
    return sizes


def test_a_tenant_has_its_part_of_the_disk_also_after_a_restart() -> None:
    with durable_server(limits=QUOTA) as server:
        created = _filled(server)
        assert 8 <= len(created) <= 9
        assert len(server.driver.sessions().sessions) == len(created)
        assert server.disk.used_bytes <= 10 * SIZE
        disk = server.killed()
    with durable_server(disk, QUOTA) as server:
        assert _filled(server) == []
        server.driver.delete(created[0])  # It is parked.
        assert len(_filled(server)) == 1
        server.driver.delete(created[1])
        assert server.driver.get(created[2]).status.steps == 0  # It comes back.
        assert len(_filled(server)) == 1
        server.driver.delete(created[2])
        assert len(_filled(server)) == 1


def test_one_tenant_that_has_filled_its_part_leaves_the_others_theirs() -> None:
    with durable_server(limits=QUOTA) as server:
        _filled(server)
        other, quotas = server.registry.of("other"), server.registry.quotas.disk
        assert server.loop.call(lambda: quotas.free_bytes(other.tenant)) == 10 * SIZE


def test_a_journal_that_comes_to_the_quota_makes_room_for_itself() -> None:
    with durable_server() as server:
        session_id = _created(server.driver)
        expected = [_step(server.driver, session_id, step) for step in range(1, 61)]
    with durable_server(limits=QUOTA) as server:
        sizes = _watched(server.disk)
        session_id = _created(server.driver)
        for step in range(1, 61):
            assert _tried(server.driver, session_id, step) == expected[step - 1]
        assert max(sizes) <= 10 * SIZE
        disk = server.killed()
    with durable_server(disk, QUOTA) as server:
        assert server.driver.get(session_id).status.steps == 60
        parameters = server.driver.download(session_id)
        assert bytes_of(parameters["w"]) == expected[-1]


def _tried(driver: StubDriver, session_id: str, step: int) -> bytes:
    """Take a step, as clients do: again, while a snapshot makes room."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return _step(driver, session_id, step)
        except RefusedError as error:
            if error.reason != "STORAGE_FULL" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@pytest.mark.parametrize("durability", [JOURNAL, snapshots(2)], ids=["journal", "snapshots"])
def test_a_step_without_room_is_refused_and_taken_once_there_is(durability: Durability) -> None:
    with durable_server(limits=QUOTA) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = _created(server.driver, durability)
        saved, error = _until_refused(lambda i: checkpoints.save(session_id, str(i)))
        assert (error.reason, error.field) == ("STORAGE_FULL", "session_id")
        assert len(checkpoints.names()) == len(saved) >= 8
        steps, error = _until_refused(lambda i: _step(server.driver, session_id, i + 1))
        assert (error.reason, error.field) == ("STORAGE_FULL", "session_id")
        assert len(steps) <= 2
        seen = see(server.driver, session_id)
        disk = server.killed()
    with durable_server(disk, QUOTA) as server:
        if durability == JOURNAL:
            assert see(server.driver, session_id) == seen
        first = server.driver.get(session_id).status.steps + 1
        checkpoints = Checkpoints(server.driver)
        with refused("STORAGE_FULL", field="session_id"):
            checkpoints.save(session_id, "more")
        for each in range(6):
            checkpoints.delete(session_id, str(each))
        for step in range(first, 20):
            _tried(server.driver, session_id, step)
        disk = server.killed()
    with durable_server(disk, QUOTA) as server:
        assert server.driver.get(session_id).status.steps >= 18


def test_what_is_counted_is_what_is_on_disk() -> None:
    with durable_server(limits=QUOTA) as server:
        session_id, driver = _created(server.driver), server.driver
        for step in range(1, 4):
            _step(driver, session_id, step)
        Checkpoints(driver).save(session_id)
        server.loop.run(server.registry.park_idle(0.0))
        _step(driver, session_id, 4)
        free = server.registry.quotas.disk.free_bytes("")
        version_bytes = len(server.disk.read("version.json"))
        assert 10 * SIZE - free == server.disk.used_bytes - version_bytes
        driver.delete(session_id)
        Checkpoints(driver).delete(session_id)
        assert server.registry.quotas.disk.free_bytes("") == 10 * SIZE


def test_a_tenant_over_a_quota_that_has_become_smaller_keeps_what_it_has() -> None:
    with durable_server() as server:
        session_id = _created(server.driver)
        for step in range(1, 4):
            _step(server.driver, session_id, step)
        seen, disk = see(server.driver, session_id), server.killed()
    with durable_server(disk, Limits(tenant_disk_bytes_max=SIZE)) as server:
        assert see(server.driver, session_id) == seen
        with refused("STORAGE_FULL", field="session_id"):
            _step(server.driver, session_id, 4)
        assert see(server.driver, session_id) == seen
        server.driver.delete(session_id)
