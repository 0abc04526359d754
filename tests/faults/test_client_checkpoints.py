"""Checkpoints with both faces of the Python client, also when the connection breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from faces import Connect, connecting
from relay import Relay, relay
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve_client import ClientConfig, Retry, TransferProgress

ADAM = optserve.optim.Adam(lr=0.1)
ONES = np.ones(1 << 20, np.float32)  # 4 MiB, and the state twice that: several messages.


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server("--data-dir", str(tmp_path_factory.mktemp("data"))) as process:
        yield process


@pytest.fixture
def wire(keeper: ServerProcess) -> Iterator[Relay]:
    with relay(keeper.address) as wire:
        yield wire


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    config = ClientConfig(lane="grpc", retry=Retry(backoff_s=0.01, backoff_max_s=0.1))
    with connecting(request.param, config) as connect:
        yield connect


def stepped(client: optserve.Client) -> optserve.Session:
    """Create a session, and take a step."""
    session = client.create_session({"w": np.zeros_like(ONES)}, optimizer=ADAM)
    session.step({"w": ONES})
    return session


def test_a_session_goes_on_from_its_checkpoint_as_it_did_itself(
    connect: Connect, keeper: ServerProcess
) -> None:
    with connect(keeper.address) as client:
        session = stepped(client)
        saved = session.save_checkpoint("first")
        assert (saved.session_id, saved.name, saved.steps) == (session.session_id, "first", 1)
        assert session.save_checkpoint("first") == saved
        session.step({"w": ONES})
        expected = session.parameters["w"].copy()
        with pytest.raises(optserve.CheckpointExistsError):
            session.save_checkpoint("first")
        second = session.save_checkpoint("second")
        session.delete()
        found = list(client.checkpoints(session.session_id, page_size=1))
        assert found == [saved, second]
        assert {each.name for each in client.checkpoints()} >= {"first", "second"}
        restored = client.restore_checkpoint(session.session_id, "first", display_name="fork")
        with restored as fork:
            assert (fork.steps, fork.spec.display_name) == (1, "fork")
            fork.step({"w": ONES})
            assert fork.parameters["w"].tobytes() == expected.tobytes()
            fork_id = fork.session_id
        with pytest.raises(optserve.SessionNotFoundError):  # As one that was created here.
            client.get_session(fork_id)
        assert client.delete_checkpoint(session.session_id, "first") == saved
        for call in (client.delete_checkpoint, client.restore_checkpoint):
            with pytest.raises(optserve.CheckpointNotFoundError):
                call(session.session_id, "first")


def test_a_download_is_a_file_whole_or_not_there(
    connect: Connect, keeper: ServerProcess, tmp_path: Path
) -> None:
    seen: list[TransferProgress] = []
    with connect(keeper.address, progress=seen.append) as client:
        session = stepped(client)
        saved = session.save_checkpoint("first")
        path = tmp_path / "first.safetensors"
        path.write_bytes(b"what was there")
        assert client.download_checkpoint(session.session_id, "first", path) == saved
        tensors = safetensors.numpy.load_file(path)
        assert tensors["parameters/w"].tobytes() == session.parameters["w"].tobytes()
        assert tensors["optimizer/w/exp_avg"].shape == ONES.shape
        size = path.stat().st_size
        last = seen[-1]
        assert (last.direction, last.done_bytes, last.total_bytes) == ("download", size, size)
        with pytest.raises(optserve.CheckpointNotFoundError):
            client.download_checkpoint(session.session_id, "no", tmp_path / "no")
        assert list(tmp_path.iterdir()) == [path]
        session.delete()


def test_whatever_is_cut_off_is_done_once(connect: Connect, wire: Relay, tmp_path: Path) -> None:
    with connect(wire.address) as client:
        session = stepped(client)
        for name in ("first", "second"):
            wire.cut_after(answered=1)
            session.save_checkpoint(name)
        before = len(list(client.list_sessions()))
        wire.cut_after(answered=1)
        fork = client.restore_checkpoint(session.session_id, "first")
        assert len(list(client.list_sessions())) == before + 1
        path = tmp_path / "first.safetensors"
        wire.cut_after(answered=5_000_000)
        client.download_checkpoint(session.session_id, "first", path)
        assert list(tmp_path.iterdir()) == [path]
        assert set(safetensors.numpy.load_file(path)) >= {"parameters/w"}
        wire.cut_after(answered=1)
        client.delete_checkpoint(session.session_id, "first")
        assert wire.cuts == 5
        assert [each.name for each in client.checkpoints(session.session_id)] == ["second"]
        for each in (fork, session):
            each.delete()
