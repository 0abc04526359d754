"""Checkpoints: a session goes on from one bit for bit, and one is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from faults.checkpointing import STEPS, Checkpoints, trained
from faults.durable import (
    HERE,
    JOURNAL,
    durable_server,
    durable_spec,
    see,
    snapshots,
    stepped,
)
from google.protobuf.json_format import Parse
from refusals import refused
from scenarios.models import B_GROUP, gradients, model, spec

from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.optimizer_pb2 import SGD, Adam, Optimizer
from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve.v1.session_pb2 import Durability, SessionSpec, SessionState
from optserve_server.core.limits import Limits
from optserve_server.core.storage import Origin


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


def test_saving_after_a_change_that_a_crash_has_undone_is_not_taken_for_a_repeat() -> None:
    with durable_server() as server:
        session_id = server.driver.create(durable_spec(snapshots(1000)), model()).status.session_id
        server.driver.update(_rate(session_id, 0.5))
        Checkpoints(server.driver).save(session_id)
        disk = server.killed()
    with durable_server(disk) as server:
        assert server.driver.get(session_id).status.rates[0].lr == 0.1
        server.driver.update(_rate(session_id, 0.25))
        with refused("CHECKPOINT_EXISTS", field="name"):
            Checkpoints(server.driver).save(session_id)
        disk = server.disk
    with durable_server(disk) as server:
        server.driver.delete(session_id)
        fork = Checkpoints(server.driver).restore(session_id)
        assert fork.status.rates[0].lr == 0.5


def _rate(session_id: str, lr: float) -> UpdateSessionRequest:
    return UpdateSessionRequest(session_id=session_id, optimizer=Optimizer(adam=Adam(lr=lr)))


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
        assert checkpoints.pages(2) == [names[:2], names[2:]]
        disk = server.killed()
    with durable_server(disk) as server:
        assert Checkpoints(server.driver).pages(2) == [names[:2], names[2:]]


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
