"""Disks that are full, fail, lose bits, or come from elsewhere: refused clearly, one by one."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from event_loop import TIMEOUT_S
from faults.disks import MemoryDisk, broken
from faults.durable import (
    FSYNC,
    HERE,
    JOURNAL,
    durable_server,
    durable_spec,
    paths,
    see,
    snapshots,
    stepped,
)
from refusals import refused
from scenarios.models import model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.scheduler_pb2 import ExponentialLR
from optserve.v1.session_pb2 import Durability, SessionState, Split
from optserve_server.storage.document import decode_document, encode_document

ELSEWHERE = dataclasses.replace(HERE, torch="1.0.0")


def test_a_step_that_torch_fails_in_fails_again_after_a_restart_and_nothing_else_does() -> None:
    # torch's plain loop takes no rate that FP32 cannot hold: the third one.
    optimizer, schedule = SGD(lr=1.0, fused=False), ExponentialLR(gamma=1e20)
    wanted = spec(optimizer, scheduler=schedule, loss=CrossEntropyLoss())
    wanted.durability.CopyFrom(JOURNAL)
    with durable_server() as server:
        session_id = server.driver.create(wanted, model()).status.session_id
        stepped(server.driver, session_id, 1, 2)
        with refused("INTERNAL"):
            stepped(server.driver, session_id, 3, 3)
        server.driver.evaluate(session_id, torch.eye(4), torch.arange(4), split=Split.SPLIT_TRAIN)
        disk = server.killed()
    for _ in range(2):
        with durable_server(disk) as server:
            status = server.driver.get(session_id).status
            assert (status.state, status.steps) == (SessionState.SESSION_STATE_FAILED, 2)
            with refused("SESSION_FAILED"):
                stepped(server.driver, session_id, 3, 3)
            request = pb.ListLossPointsRequest(session_id=session_id)
            assert len(server.driver.loss_points(request).points) == 1
            disk = server.killed()


def test_a_full_disk_refuses_the_step_and_takes_it_once_there_is_room() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        stepped(server.driver, session_id, 1, 1)
        before = see(server.driver, session_id)
        server.disk.capacity = server.disk.used_bytes
        for _ in range(2):
            with refused("STORAGE_FULL", field="session_id"):
                stepped(server.driver, session_id, 2, 2)
            with refused("STORAGE_FULL", field="session_id"):
                server.driver.end_epoch(session_id, 1)
            with refused("STORAGE_FULL", field="session_id"):
                server.driver.upload(session_id, {"b": torch.ones(5)})
            with refused("STORAGE_FULL", field="spec.durability"):
                server.driver.create(durable_spec(JOURNAL), model())
            assert see(server.driver, session_id) == before
        assert len(server.driver.sessions().sessions) == 1
        server.disk.capacity = 1 << 40
        expected = stepped(server.driver, session_id, 2, 3)
        disk = server.killed()
    with durable_server(disk) as server:
        assert stepped(server.driver, session_id, 3, 3) == expected


def test_snapshots_that_find_no_room_hold_the_session_before_more_is_lost_than_was_agreed() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(snapshots(4)), model()).status.session_id
        stepped(server.driver, session_id, 1, 1)
        server.disk.capacity = server.disk.used_bytes
        stepped(server.driver, session_id, 2, 4)
        with refused("STORAGE_FULL", field="session_id"):
            stepped(server.driver, session_id, 5, 5)
        server.disk.capacity = 1 << 40
        stepped(server.driver, session_id, 5, 9)


def test_a_snapshot_that_found_no_room_is_not_tried_again_at_every_step() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(snapshots(40)), model()).status.session_id
        stepped(server.driver, session_id, 1, 1)
        tried = []

        def note(operation: str) -> None:
            if operation.startswith("create "):
                tried.append(operation)

        server.disk.before = note
        server.disk.capacity = server.disk.used_bytes
        stepped(server.driver, session_id, 2, 39)  # It is due at the twentieth.
        assert len(tried) == 1


def test_a_disk_that_fails_ends_the_session_and_a_restart_brings_back_what_was_acknowledged() -> (
    None
):
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(FSYNC), model()).status.session_id
        expected = stepped(server.driver, session_id, 1, 2)

        with broken(server.disk, "sync"):
            with refused("SESSION_FAILED"):
                stepped(server.driver, session_id, 3, 3)
            with refused("SESSION_FAILED"):
                server.driver.end_epoch(session_id, 1)
        status = server.driver.get(session_id).status
        assert status.state == SessionState.SESSION_STATE_FAILED
        assert status.durable_steps == 2  # The third one may be there, or not.
        disk = server.unplugged()
        server.disk.before = lambda _: None
    with durable_server(disk) as server:
        status = server.driver.get(session_id).status
        assert status.state == SessionState.SESSION_STATE_READY
        assert status.steps in (2, 3)  # What was not acknowledged may be there.
        assert stepped(server.driver, session_id, 2, 2) == expected or status.steps == 3


def test_an_epoch_whose_end_the_disk_failed_in_is_not_answered_as_if_it_had_ended() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(FSYNC), model()).status.session_id
        stepped(server.driver, session_id, 1, 2)
        for _ in range(2):  # A client that has no answer asks again.
            with broken(server.disk, "sync"), refused("SESSION_FAILED"):
                server.driver.end_epoch(session_id, 1)


@pytest.mark.parametrize("operation", ["sync sessions/", "list sessions/", "rename sessions/"])
def test_of_a_session_that_the_disk_fails_to_create_nothing_is_left(operation: str) -> None:
    with durable_server() as server:
        with broken(server.disk, operation), refused("SESSION_FAILED"):
            server.driver.create(durable_spec(JOURNAL), model())
        assert not server.driver.sessions().sessions
        assert server.registry.budget.reserved_bytes == 0
        disk = server.killed()
    with durable_server(disk) as server:
        assert not server.driver.sessions().sessions
        assert not paths(disk, "sessions")


@pytest.mark.parametrize("where", ["in memory", "on disk"])
@pytest.mark.parametrize("operation", ["rename sessions", "sync sessions/", "remove sessions"])
def test_a_session_that_the_disk_keeps_can_be_deleted_again(operation: str, where: str) -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        stepped(server.driver, session_id, 1, 2)
        if where == "on disk":
            assert server.loop.run(server.registry.park_idle(0)) == [session_id]
        for _ in range(2):
            with broken(server.disk, operation), refused("SESSION_FAILED"):
                server.driver.delete(session_id)
            assert [each.session_id for each in server.driver.sessions().sessions] == [session_id]
        server.driver.delete(session_id)
        assert not server.driver.sessions().sessions
        with refused("SESSION_NOT_FOUND"):
            server.driver.delete(session_id)
        assert server.registry.budget.reserved_bytes == 0
        disk = server.killed()
    with durable_server(disk) as server:
        assert not server.driver.sessions().sessions


@pytest.mark.parametrize("durability", [Durability(), JOURNAL], ids=["in-memory", "on-disk"])
def test_a_request_that_comes_again_while_its_session_is_deleted_makes_another(
    durability: Durability,
) -> None:
    wanted, reading, read = durable_spec(durability), threading.Event(), threading.Event()
    with durable_server() as server, ThreadPoolExecutor() as threads:
        first = server.driver.create(wanted, model(), "again").status.session_id
        actor = server.loop.run(server.registry.find("", first))

        async def hold() -> None:
            async with actor.work.lock.shared():
                reading.set()
                await asyncio.to_thread(read.wait, TIMEOUT_S)

        holding = server.loop.start(hold())
        assert reading.wait(TIMEOUT_S)
        deletion = threads.submit(server.driver.delete, first)
        while not actor.closed:
            time.sleep(0.001)
        creation = threads.submit(server.driver.create, wanted, model(), "again")
        time.sleep(0.1)
        read.set()
        holding.result()
        assert deletion.result().session_id == first
        second = creation.result().status.session_id
        assert [each.session_id for each in server.driver.sessions().sessions] == [second]
        assert server.driver.create(wanted, model(), "again").status.session_id == second


def _damage(disk: MemoryDisk, session_id: str, kind: str) -> None:
    """Flip a bit in the middle of each of a session's files of a kind."""
    found = [path for path in paths(disk) if session_id in path and kind in path]
    assert found
    for path in found:
        disk.damage(path, len(disk.read(path)) // 2)


@pytest.mark.parametrize("kind", ["journal", "snapshot"])
def test_damage_refuses_its_session_and_no_other(kind: str) -> None:
    with durable_server() as server:
        ids = [
            server.driver.create(durable_spec(JOURNAL), model()).status.session_id for _ in range(2)
        ]
        for session_id in ids:
            stepped(server.driver, session_id, 1, 5)
        seen = see(server.driver, ids[1])
        disk = server.killed()
    _damage(disk, ids[0], kind)
    with durable_server(disk) as server:
        for _ in range(2):
            with refused("SESSION_DAMAGED", field="session_id"):
                server.driver.get(ids[0])
        assert see(server.driver, ids[1]) == seen
        states = {each.session_id: each.state for each in server.driver.sessions().sessions}
        assert states == {
            ids[0]: SessionState.SESSION_STATE_DAMAGED,
            ids[1]: SessionState.SESSION_STATE_READY,
        }
        server.driver.delete(ids[0])
        assert [each.session_id for each in server.driver.sessions().sessions] == [ids[1]]


def test_a_foreign_journal_is_replayed_only_when_that_is_asked_for() -> None:
    with durable_server(origin=ELSEWHERE) as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        stepped(server.driver, session_id, 1, 3)
        seen = see(server.driver, session_id)
        disk = server.killed()
    with durable_server(disk) as server:
        with refused("JOURNAL_FOREIGN", field="session_id"):
            server.driver.get(session_id)
        (listed,) = server.driver.sessions().sessions
        assert listed.state == SessionState.SESSION_STATE_PARKED
        disk = server.killed()
    with durable_server(disk, replay_foreign=True) as server:
        assert see(server.driver, session_id) == seen


def test_what_a_newer_server_says_of_a_session_is_not_taken_for_damage_and_is_kept() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        seen, disk = see(server.driver, session_id), server.killed()
    path = f"sessions/{session_id}/head.json"
    head = disk.read(path)
    content = decode_document(path, head)
    content["facts"] |= {"version": content["facts"]["version"] + 1, "standing": "another form"}
    disk.overwrite(path, encode_document(content))
    with durable_server(disk) as server:
        (listed,) = server.driver.sessions().sessions
        assert listed.state == SessionState.SESSION_STATE_PARKED
        with refused("JOURNAL_FOREIGN", field="session_id"):
            server.driver.get(session_id)
        assert server.loop.run(server.registry.expire_idle(0.0, 0.0)) == []
        disk = server.killed()
    disk.overwrite(path, head)
    with durable_server(disk) as server:
        assert see(server.driver, session_id) == seen


@pytest.mark.parametrize(
    ("durability", "unreadable"),
    [(FSYNC, "journal"), (FSYNC, "tensors"), (snapshots(2), "tensors")],
    ids=["journal", "only-snapshot", "last-snapshot"],
)
def test_a_disk_that_does_not_give_a_session_back_now_may_do_so_later(
    durability: Durability, unreadable: str, caplog: pytest.LogCaptureFixture
) -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(durability), model()).status.session_id
        stepped(server.driver, session_id, 1, 4)
        seen = see(server.driver, session_id)
        while server.driver.get(session_id).status.durable_steps < 4:
            time.sleep(0.01)
        disk = server.killed()
    last = max(path for path in paths(disk) if unreadable in path)

    with durable_server(disk) as server:
        # It is no damage, and no reason to go on from an older snapshot.
        for _ in range(2):
            with broken(disk, f"open {last}", f"read {last}"), refused("SESSION_FAILED"):
                server.driver.get(session_id)
        assert "the disk has failed" in caplog.text
        assert see(server.driver, session_id) == seen


def test_a_session_whose_facts_are_damaged_is_told_of_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(JOURNAL), model()).status.session_id
        disk = server.killed()
    for kind in ("head.json", "manifest.json"):
        _damage(disk, session_id, kind)
    with durable_server(disk):
        (record,) = [each for each in caplog.records if "not what was written" in each.message]
        assert record.__dict__["session"] == session_id
        assert f"{session_id}/head.json: byte 0" in record.__dict__["cause"]


def test_a_session_that_cannot_be_saved_keeps_no_other_from_being_saved_and_parked() -> None:
    with durable_server() as server:
        ids = [
            server.driver.create(durable_spec(snapshots(100)), model()).status.session_id
            for _ in range(3)
        ]

        def fail(operation: str) -> None:
            if operation.startswith(f"create sessions/{ids[0]}/snapshot"):
                raise RuntimeError("no class of storage's")

        server.disk.before = fail
        for session_id in ids[:2]:
            stepped(server.driver, session_id, 1, 3)
        assert server.loop.run(server.registry.park_idle(0)) == ids[1:]
        for session_id in ids[1:]:
            stepped(server.driver, session_id, 4 if session_id == ids[1] else 1, 5)
        disk = server.disk
    disk.before = lambda _: None
    disk.restart()
    with durable_server(disk) as server:
        steps = [server.driver.get(session_id).status.steps for session_id in ids]
        assert steps == [0, 5, 5]
