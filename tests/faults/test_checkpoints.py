"""Checkpoints: a session goes on from one bit for bit, and one is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.durable import (
    HERE,
    JOURNAL,
    durable_server,
    durable_spec,
    paths,
    see,
    snapshots,
    stepped,
)
from faults.ground import Mistakes, ground
from google.protobuf.json_format import Parse
from refusals import RefusedError, refused, translated
from scenarios.models import B_GROUP, gradients, model, spec
from server_process import running_server

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.session_pb2 import Durability, Session, SessionSpec, SessionState
from optserve_server.core.errors import CheckpointNotFoundError
from optserve_server.core.limits import Limits
from optserve_server.core.storage import Origin
from optserve_server.storage.places import UNFINISHED

STEPS = 3
"""How many a session has taken that is saved."""


class Checkpoints:
    """Calls a server about them."""

    def __init__(self, driver: StubDriver) -> None:
        self.stub = driver.stub

    def save(self, session_id: str, name: str = "best") -> Checkpoint:
        request = pb.SaveCheckpointRequest(session_id=session_id, name=name)
        with translated():
            return self.stub.SaveCheckpoint(request, timeout=TIMEOUT_S).checkpoint

    def page(self, **asked: object) -> pb.ListCheckpointsResponse:
        with translated():
            return self.stub.ListCheckpoints(
                pb.ListCheckpointsRequest(**asked),  # type: ignore[arg-type]
                timeout=TIMEOUT_S,
            )

    def names(self, session_id: str = "") -> list[str]:
        return [each.name for each in self.page(session_id=session_id).checkpoints]

    def restore(self, session_id: str, name: str = "best", **asked: str) -> Session:
        request = pb.RestoreCheckpointRequest(session_id=session_id, name=name, **asked)
        with translated():
            return self.stub.RestoreCheckpoint(request, timeout=TIMEOUT_S).session

    def download(self, session_id: str, name: str = "best") -> tuple[pb.CheckpointBegin, bytes]:
        request = pb.DownloadCheckpointRequest(session_id=session_id, name=name)
        with translated():
            first, *rest = self.stub.DownloadCheckpoint(request, timeout=TIMEOUT_S)
        return first.begin, b"".join(each.data for each in rest)

    def delete(self, session_id: str, name: str = "best") -> Checkpoint:
        request = pb.DeleteCheckpointRequest(session_id=session_id, name=name)
        with translated():
            return self.stub.DeleteCheckpoint(request, timeout=TIMEOUT_S).checkpoint


def trained(driver: StubDriver, durability: Durability = JOURNAL) -> str:
    """Create a session that has one of everything, and has stepped."""
    session_id = driver.create(durable_spec(durability), model()).status.session_id
    stepped(driver, session_id, 1, STEPS)
    driver.end_epoch(session_id, 1)
    driver.evaluate(session_id, torch.eye(4), torch.arange(4))
    return session_id


@pytest.mark.parametrize(
    "durability", [Durability(), JOURNAL, snapshots(1000)], ids=["none", "journal", "snapshots"]
)
def test_a_restored_session_is_the_saved_one_and_goes_on_as_it_did(durability: Durability) -> None:
    with durable_server() as server:
        driver, checkpoints = server.driver, Checkpoints(server.driver)
        session_id = trained(driver, durability)
        saved = checkpoints.save(session_id)
        seen = see(driver, session_id)
        assert (saved.session_id, saved.name) == (session_id, "best")
        assert (saved.steps, saved.epochs, saved.optimizer) == (STEPS, 1, "Adam")
        assert (saved.parameter_count, saved.torch_version) == (20, HERE.torch)
        expected = stepped(driver, session_id, STEPS + 1, STEPS + 5)
        driver.delete(session_id)
        disk = server.killed()
    with durable_server(disk) as server:
        driver, checkpoints = server.driver, Checkpoints(server.driver)
        assert list(checkpoints.page().checkpoints) == [saved]
        forks = [checkpoints.restore(session_id).status.session_id for _ in range(2)]
        assert len({session_id, *forks}) == 3
        for fork in forks:
            came = see(driver, fork)
            assert came.session.spec == seen.session.spec
            assert (came.parameters, came.points) == (seen.parameters, seen.points)
            assert came.session.status.rates == seen.session.status.rates
            assert stepped(driver, fork, STEPS + 1, STEPS + 5) == expected
        disk = server.killed()
    with durable_server(disk) as server:  # Restored sessions are as durable as their specs say.
        found = {each.session_id for each in server.driver.sessions().sessions}
        assert found == (set(forks) if durability.mode else set())
        if durability == JOURNAL:
            assert see(server.driver, forks[0]).parameters == expected


def test_a_session_is_not_changed_by_what_becomes_of_its_checkpoint() -> None:
    with durable_server() as server:
        driver, checkpoints = server.driver, Checkpoints(server.driver)
        session_id = trained(driver)
        checkpoints.save(session_id)
        seen = see(driver, session_id)
        fork = checkpoints.restore(session_id, display_name="fork")
        assert fork.status.display_name == "fork"
        stepped(driver, fork.status.session_id, STEPS + 1, STEPS + 2)
        driver.delete(fork.status.session_id)
        checkpoints.delete(session_id)
        assert see(driver, session_id) == seen


def test_saving_again_is_answered_with_what_is_there_and_refused_after_a_change() -> None:
    with durable_server() as server:
        driver, checkpoints = server.driver, Checkpoints(server.driver)
        session_id = trained(driver)
        saved = checkpoints.save(session_id)
        assert checkpoints.save(session_id) == saved
        disk = server.killed()
    with durable_server(disk) as server:
        checkpoints = Checkpoints(server.driver)
        assert checkpoints.save(session_id) == saved  # The session comes back for it.
        stepped(server.driver, session_id, STEPS + 1, STEPS + 1)
        with refused("CHECKPOINT_EXISTS", field="name"):
            checkpoints.save(session_id)
        other = trained(server.driver)
        assert checkpoints.save(other).session_id == other  # The name is the session's own.
        assert checkpoints.names() == ["best", "best"]
        assert checkpoints.names(other) == ["best"]


def test_saving_after_steps_that_a_crash_has_undone_is_not_taken_for_a_repeat() -> None:
    with durable_server() as server:
        driver, checkpoints = server.driver, Checkpoints(server.driver)
        wanted = durable_spec(snapshots(1000))
        session_id = driver.create(wanted, model()).status.session_id
        stepped(driver, session_id, 1, STEPS)
        checkpoints.save(session_id)
        disk = server.killed()
    with durable_server(disk) as server:
        assert server.driver.get(session_id).status.steps == 0
        with server.driver.worker(session_id) as worker:
            for step in range(1, STEPS + 1):
                worker.start(step, gradients(step + 10)).result()
        with refused("CHECKPOINT_EXISTS", field="name"):
            Checkpoints(server.driver).save(session_id)


def test_a_restoring_that_is_repeated_makes_one_session() -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)
        checkpoints.save(session_id)
        checkpoints.save(session_id, "other")
        made = checkpoints.restore(session_id, request_id="mine")
        disk = server.killed()
    with durable_server(disk) as server:
        checkpoints = Checkpoints(server.driver)
        again = checkpoints.restore(session_id, request_id="mine")
        assert again.status.session_id == made.status.session_id
        with refused("REQUEST_CONFLICT", field="request_id"):
            checkpoints.restore(session_id, "other", request_id="mine")
        assert len(server.driver.sessions().sessions) == 2


def test_checkpoints_are_listed_in_pages_the_oldest_first() -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)
        names = [f"number {i}" for i in range(5)]
        for name in names:
            checkpoints.save(session_id, name)
        assert checkpoints.delete(session_id, names.pop(1)).steps == STEPS
        for restarted in (False, True):
            pages, token = [], ""
            with durable_server(server.killed()) if restarted else _same(server) as asked:
                while not pages or token:
                    page = Checkpoints(asked.driver).page(page_size=2, page_token=token)
                    pages.append([each.name for each in page.checkpoints])
                    token = page.next_page_token
            assert pages == [names[:2], names[2:]]


@contextmanager
def _same(server: object) -> Iterator[object]:
    yield server


def test_a_download_is_a_file_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    with durable_server(limits=Limits(chunk_bytes_max=1024)) as server:
        checkpoints = Checkpoints(server.driver)
        session_id = trained(server.driver)
        saved = checkpoints.save(session_id)
        seen = see(server.driver, session_id)
        begin, data = checkpoints.download(session_id)
    assert (begin.checkpoint, begin.byte_count) == (saved, len(data))
    tensors = safetensors.torch.load(data)
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | {
        f"parameters/{name}": value for name, value in seen.parameters.items()
    } == {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    kept = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"parameters/{name}" for name in "wb"} | {
        f"optimizer/{name}/{key}" for name in "wb" for key in kept
    }
    assert tensors["optimizer/w/exp_avg"].shape == model()["w"].shape
    assert tensors["optimizer/b/exp_avg"].shape == model()["b"].shape
    path = tmp_path / "best.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert Parse(metadata["checkpoint"], Checkpoint()) == saved
    assert Parse(metadata["spec"], SessionSpec()) == seen.session.spec
    rates = {rate.group: rate.lr for rate in seen.session.status.rates}
    assert json.loads(metadata["rates"]) == rates
    assert json.loads(metadata["numbers"]) == {}


def test_what_is_restored_elsewhere_is_a_state_and_no_journal() -> None:
    with durable_server() as server:
        session_id = trained(server.driver)
        Checkpoints(server.driver).save(session_id)
        expected = stepped(server.driver, session_id, STEPS + 1, STEPS + 2)
        disk = server.killed()
    elsewhere = Origin(torch="1.0.0", device="another")
    with durable_server(disk, origin=elsewhere) as server:
        with refused("JOURNAL_FOREIGN", field="session_id"):
            server.driver.get(session_id)
        fork = Checkpoints(server.driver).restore(session_id).status.session_id
        assert stepped(server.driver, fork, STEPS + 1, STEPS + 2) == expected


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
        trained(server.driver)
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


def test_a_session_that_awaits_its_parameters_does_so_again() -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        wanted = spec(SGD(lr=1.0), groups=[B_GROUP])
        session_id = server.driver.create(wanted, {"b": model()["b"]}).status.session_id
        checkpoints.save(session_id)
        fork = checkpoints.restore(session_id)
        assert fork.status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS
        server.driver.upload(fork.status.session_id, {"w": model()["w"]})
        assert stepped(server.driver, fork.status.session_id, 1, 1)


@pytest.mark.parametrize("spec_of", [Adam(lr=0.1, amsgrad=True), SGD(lr=0.1)], ids=["Adam", "SGD"])
def test_states_with_and_without_tensors_are_saved(spec_of: Adam | SGD) -> None:
    with durable_server() as server:
        checkpoints = Checkpoints(server.driver)
        session_id = server.driver.create(spec(spec_of), model()).status.session_id
        stepped(server.driver, session_id, 1, 2)
        checkpoints.save(session_id)
        fork = checkpoints.restore(session_id).status.session_id
        assert stepped(server.driver, fork, 3, 4) == stepped(server.driver, session_id, 3, 4)
        begin, data = checkpoints.download(session_id)
        assert len(data) == begin.byte_count


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
