"""What becomes of checkpoints when something is wrong: with the disk, the caller, or the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.checkpointing import STEPS, Checkpoints, trained
from faults.durable import (
    JOURNAL,
    durable_server,
    durable_spec,
    paths,
    see,
    stepped,
)
from faults.ground import Mistakes, ground
from refusals import RefusedError, refused, translated
from scenarios.models import model, spec
from server_process import running_server

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import Durability
from optserve_server.core.errors import CheckpointNotFoundError
from optserve_server.core.limits import Limits
from optserve_server.storage.places import UNFINISHED


def test_damage_is_the_trouble_of_one_checkpoint_which_can_be_deleted() -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)
        checkpoints.save(session_id)
        before = set(paths(server.disk))
        checkpoints.save(session_id, "other")
        files = sorted(set(paths(server.disk)) - before)
        assert len(files) == 2
    for file in files:  # The manifest, and the tensors.
        disk = server.killed()
        disk.damage(file, len(disk.read(file)) // 2)
        with durable_server(disk) as asked:
            checkpoints = Checkpoints(asked.driver)
            for call in (checkpoints.restore, checkpoints.download):
                with refused("SESSION_DAMAGED", field="name"):
                    call(session_id, "other")
            assert checkpoints.restore(session_id).status.steps == STEPS
            stepped(asked.driver, session_id, STEPS + 1, STEPS + 1)
            with refused("CHECKPOINT_EXISTS", field="name"):
                checkpoints.save(session_id, "other")
            assert checkpoints.delete(session_id, "other").name == "other"
            assert checkpoints.names() == ["best"]
            assert checkpoints.save(session_id, "other").steps == STEPS + 1


def test_a_full_disk_refuses_to_save_and_saves_once_there_is_room() -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver, Durability())
        capacity, server.disk.capacity = server.disk.capacity, server.disk.used_bytes + 100
        with refused("STORAGE_FULL"):
            checkpoints.save(session_id)
        assert checkpoints.names() == []
        server.disk.capacity = capacity
        assert checkpoints.save(session_id).steps == STEPS


def test_a_session_without_room_for_a_copy_of_it_is_saved_all_the_same() -> None:
    with durable_server() as server:
        trained(server.driver, Durability())
        needed = server.registry.budget.reserved_bytes
    with durable_server(limits=Limits(memory_bytes_max=needed)) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = server.driver.create(durable_spec(Durability()), model()).status.session_id
        stepped(server.driver, session_id, 1, STEPS)
        seen = see(server.driver, session_id)
        checkpoints.save(session_id)
        assert server.registry.budget.reserved_bytes == needed
        for call in (checkpoints.restore, checkpoints.download):
            with refused("MEMORY_EXHAUSTED", field="name"):
                call(session_id)
        server.driver.delete(session_id)
        assert server.registry.budget.reserved_bytes == 0
        disk = server.disk
    with durable_server(disk) as server:
        fork = Checkpoints(server.driver).restore(session_id).status.session_id
        assert see(server.driver, fork).parameters == seen.parameters
        assert server.registry.budget.reserved_bytes == needed


REFUSED: dict[str, tuple[Callable[[Checkpoints, str], object], str, str]] = {
    "save of no session": (lambda c, _: c.save("0" * 32), "SESSION_NOT_FOUND", "session_id"),
    "save without a name": (lambda c, i: c.save(i, ""), "INVALID_NAME", "name"),
    "save under a control character": (lambda c, i: c.save(i, "a\nb"), "INVALID_NAME", "name"),
    "save under a long name": (lambda c, i: c.save(i, "ä" * 129), "LIMIT_EXCEEDED", "name"),
    "one too many": (lambda c, i: c.save(i, "third"), "TOO_MANY", "name"),
    "restore of nothing": (lambda c, i: c.restore(i, "no"), "CHECKPOINT_NOT_FOUND", "name"),
    "restore of no session": (lambda c, _: c.restore("../x"), "CHECKPOINT_NOT_FOUND", "name"),
    "restore under a bad name": (
        lambda c, i: c.restore(i, display_name="a\0"),
        "INVALID_NAME",
        "display_name",
    ),
    "download of nothing": (lambda c, i: c.download(i, "no"), "CHECKPOINT_NOT_FOUND", "name"),
    "download of no session": (lambda c, _: c.download("/"), "CHECKPOINT_NOT_FOUND", "name"),
    "deletion of no session": (lambda c, _: c.delete("../x"), "CHECKPOINT_NOT_FOUND", "name"),
    "deletion of nothing": (lambda c, i: c.delete(i, "no"), "CHECKPOINT_NOT_FOUND", "name"),
    "a page that is none": (lambda c, _: c.page(page_token="x"), "INVALID_FIELD", "page_token"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(mistake: str) -> None:
    act, reason, field = REFUSED[mistake]
    with durable_server(limits=Limits(checkpoints_max=2)) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)
        for name in ("best", "other"):
            checkpoints.save(session_id, name)
        before = see(server.driver, session_id), paths(server.disk)
        with refused(reason, field=field):
            act(checkpoints, session_id)
        assert (see(server.driver, session_id), paths(server.disk)) == before
        assert len(server.driver.sessions().sessions) == 1
        checkpoints.delete(session_id)
        checkpoints.save(session_id, "third")  # There is room for as many again.


CALLS: dict[str, Callable[[Checkpoints, str], object]] = {
    "save": Checkpoints.save,
    "page": lambda checkpoints, _: checkpoints.page(),
    "restore": Checkpoints.restore,
    "download": Checkpoints.download,
    "delete": Checkpoints.delete,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_server_without_a_disk_says_so(call: str) -> None:
    with ground() as where, Mistakes(where).refused("NO_STORAGE", ""):
        CALLS[call](Checkpoints(where.driver), where.session_id)


def test_another_tenant_s_checkpoints_are_not_there() -> None:
    with durable_server() as server:
        session_id = trained(server.driver)
        Checkpoints(server.driver).save(session_id)
        other = server.registry.of("other")

        async def opened() -> None:
            async with other.opened_checkpoint(session_id, "best"):
                pass

        assert server.loop.run(other.checkpoint_page("", after=0, count=10)) == ([], None)
        with pytest.raises(CheckpointNotFoundError):
            server.loop.run(opened())
        with pytest.raises(CheckpointNotFoundError):
            server.loop.run(other.delete_checkpoint(session_id, "best"))
        assert Checkpoints(server.driver).names() == ["best"]


def test_a_failed_session_is_not_saved() -> None:
    with durable_server() as server:
        session_id = trained(server.driver, Durability())
        actor = server.loop.run(server.registry.find("", session_id))
        actor.session.failed = True
        with refused("SESSION_FAILED"):
            Checkpoints(server.driver).save(session_id)
        assert Checkpoints(server.driver).names() == []


def test_a_kill_in_the_middle_of_saving_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    environment = {"OPTSERVE_FAILPOINTS": "snapshot-half-written=kill@3"}
    flags = ("--data-dir", str(tmp_path))
    with (
        running_server(*flags, environment=environment) as server,
        StubDriver(server.address) as driver,
    ):
        checkpoints = Checkpoints(driver)
        # What is written first is the session's snapshot; then comes the first checkpoint.
        session_id = driver.create(durable_spec(JOURNAL), model()).status.session_id
        stepped(driver, session_id, 1, STEPS)
        saved = checkpoints.save(session_id)
        expected = stepped(driver, session_id, STEPS + 1, STEPS + 1)
        with pytest.raises(RefusedError):
            checkpoints.save(session_id, "second")
        server.process.wait(TIMEOUT_S)
    with running_server(*flags) as server, StubDriver(server.address) as driver:
        checkpoints = Checkpoints(driver)
        assert list(checkpoints.page().checkpoints) == [saved]
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(UNFINISHED)]
        assert see(driver, session_id).parameters == expected
        assert checkpoints.save(session_id, "second").steps == STEPS + 1
        assert checkpoints.restore(session_id).status.steps == STEPS


def test_who_does_not_read_a_download_is_let_go_and_holds_no_memory() -> None:
    values = {"large": torch.zeros(16_000_000)}  # 64 MB: more than any buffer on the way holds.
    with durable_server(limits=Limits(stall_timeout_s=0.5)) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = server.driver.create(spec(SGD(lr=1.0), parameters=values)).status.session_id
        server.driver.upload(session_id, values)
        checkpoints.save(session_id)
        before = server.registry.budget.reserved_bytes
        request = pb.DownloadCheckpointRequest(session_id=session_id, name="best")
        responses = checkpoints.stub.DownloadCheckpoint(request, timeout=TIMEOUT_S)
        assert next(responses).HasField("begin")
        assert server.registry.budget.reserved_bytes > before + values["large"].nbytes
        time.sleep(1.5)
        with refused("STALLED"), translated():
            list(responses)
        assert server.registry.budget.reserved_bytes == before


def test_who_saves_at_the_same_time_gets_no_more_than_is_allowed_and_each_name_once() -> None:
    with durable_server(limits=Limits(checkpoints_max=5)) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)

        def save(name: str) -> str:
            try:
                return checkpoints.save(session_id, name).name
            except RefusedError as error:
                return error.reason

        asked = [f"number {i % 8}" for i in range(32)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(save, asked))
        names = checkpoints.names()
        assert len(names) == 5
        assert answers == [name if name in names else "TOO_MANY" for name in asked]
