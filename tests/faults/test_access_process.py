"""A server behind its doors: certificates and tokens that change, sockets, what its log says."""

from __future__ import annotations

import base64
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch
from certificates import Authority, ServerFiles, tls_channel, token_file
from drivers import take
from drivers_grpc import StubDriver
from faults.ground import rich_spec
from faults.strangers import (
    AUDIENCE,
    ISSUER,
    NEIGHBOUR,
    NEIGHBOUR_TOKEN,
    OWNER,
    OWNER_TOKEN,
    ChannelDriver,
    Provider,
    closed_ground,
)
from messages import bytes_of
from refusals import refused
from scenarios.models import gradients, model
from server_process import running_server

from optserve.v1.session_pb2 import DurabilityMode, SessionState

TIMEOUT_S = 20.0
LOOK_S = 1.5  # Files are read again a second after they were.


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _connects(address: str, root: bytes) -> bool:
    """Return whether a new connection is made, with a server that ``root`` vouches for."""
    with tls_channel(address, root) as channel:
        try:
            grpc.channel_ready_future(channel).result(1)
        except grpc.FutureTimeoutError:
            return False
        return True


def _served(driver: StubDriver) -> str:
    return driver.create(rich_spec(), model()).status.session_id


def test_certificates_change_under_a_running_server(authority: Authority, tmp_path: Path) -> None:
    files, other = ServerFiles.of(tmp_path, authority.server()), Authority()
    with ExitStack() as stack:
        server = stack.enter_context(running_server(*files.flags))
        old = stack.enter_context(tls_channel(server.address, authority.root))
        driver = ChannelDriver(old)
        session_id = _served(driver)
        worker = stack.enter_context(driver.worker(session_id))
        take(worker, 1, gradients(1))

        half = other.server()
        files.certificate.write_bytes(half.certificate)  # And the key not yet.
        time.sleep(LOOK_S)
        assert _connects(server.address, authority.root)
        assert not _connects(server.address, other.root)
        assert "changed files are not used" in server.log.read_text()

        files.key.write_bytes(half.key)
        _until(lambda: _connects(server.address, other.root))
        assert not _connects(server.address, authority.root)

        take(worker, 2, gradients(2))  # The old connection goes on.
        assert driver.get(session_id).status.steps == 2
        with tls_channel(server.address, other.root) as new:
            assert ChannelDriver(new).get(session_id).status.steps == 2


def test_authorities_of_clients_change_under_a_running_server(tmp_path: Path) -> None:
    other = Authority()
    with closed_ground(tmp_path, certificates=True) as closed:
        (tmp_path / "clients.pem").write_bytes(other.root)
        time.sleep(LOOK_S)
        with closed.channel(client=other.client(common_name=OWNER)) as channel:
            ChannelDriver(channel).get(closed.where.session_id)
        mine = closed.authority.client(common_name=OWNER)
        with closed.channel(client=mine) as channel, refused(""):
            ChannelDriver(channel).get(closed.where.session_id)
        closed.where.look()  # The old connection goes on.


def test_tokens_are_given_and_taken_back_under_a_running_server(tmp_path: Path) -> None:
    with closed_ground(tmp_path) as closed:
        tokens, driver = tmp_path / "tokens.toml", closed.where.driver
        with driver.worker(closed.where.session_id) as worker:
            token_file(tokens, [])
            time.sleep(LOOK_S)
            with refused("UNAUTHENTICATED"):
                driver.sessions()
            with refused("UNAUTHENTICATED"):
                take(worker, 2, gradients(2))
        token_file(tokens, [(OWNER, OWNER_TOKEN)])
        tokens.write_text(tokens.read_text() + "[[token]")  # Half of an entry.
        time.sleep(LOOK_S)
        with refused("UNAUTHENTICATED"):
            driver.sessions()
        token_file(tokens, [(OWNER, OWNER_TOKEN)])
        time.sleep(LOOK_S)
        assert driver.get(closed.where.session_id).status.steps == 1


def test_owners_are_known_again_after_a_restart(authority: Authority, tmp_path: Path) -> None:
    files = ServerFiles.of(tmp_path, authority.server())
    tokens = [(OWNER, OWNER_TOKEN), (NEIGHBOUR, NEIGHBOUR_TOKEN)]
    flags = [*files.flags, "--tokens", str(token_file(tmp_path / "tokens.toml", tokens))]
    flags += ["--data-dir", str(tmp_path / "data")]
    wanted = rich_spec()
    wanted.durability.mode = DurabilityMode.DURABILITY_MODE_JOURNAL
    with (
        running_server(*flags) as server,
        tls_channel(server.address, authority.root, token=OWNER_TOKEN) as channel,
    ):
        session_id = ChannelDriver(channel).create(wanted, model()).status.session_id
    with running_server(*flags) as server:
        with tls_channel(server.address, authority.root, token=NEIGHBOUR_TOKEN) as channel:
            neighbour = ChannelDriver(channel)
            assert not neighbour.sessions().sessions
            with refused("SESSION_NOT_FOUND"):
                neighbour.get(session_id)
            with refused("SESSION_NOT_FOUND"):
                neighbour.delete(session_id)
        with tls_channel(server.address, authority.root, token=OWNER_TOKEN) as channel:
            owner = ChannelDriver(channel)
            (status,) = owner.sessions().sessions
            # The neighbour has not even had it brought back from disk.
            assert status.state == SessionState.SESSION_STATE_PARKED
            assert owner.get(session_id).status.state == SessionState.SESSION_STATE_READY


def test_the_log_holds_no_secret_and_no_value_even_at_its_most_talkative(
    authority: Authority, tmp_path: Path
) -> None:
    files, provider = ServerFiles.of(tmp_path, authority.server()), Provider()
    tokens = token_file(tmp_path / "tokens.toml", [(OWNER, OWNER_TOKEN)])
    keys = tmp_path / "jwks.json"
    keys.write_text(provider.key_set("one"))
    issued = provider.token("carol")
    wrong = ["a-wrong-token", *provider.bad_tokens().values()]
    flags = [*files.flags, "--tokens", str(tokens), "--jwt-jwks", str(keys)]
    flags += ["--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwt-claim", "claimed_tenant"]
    secret = torch.full((8,), 0.123456789)
    with running_server(*flags, "--log-level", "debug") as server:
        for token in (OWNER_TOKEN, issued):
            with tls_channel(server.address, authority.root, token=token) as channel:
                driver = ChannelDriver(channel)
                session_id = _served(driver)
                with driver.worker(session_id) as worker:
                    take(worker, 1, gradients(1))
                with refused("UNKNOWN_NAME"):
                    driver.upload(session_id, {"nothing": secret})
        for token in wrong:
            with (
                tls_channel(server.address, authority.root, token=token) as channel,
                refused("UNAUTHENTICATED"),
            ):
                ChannelDriver(channel).sessions()
        server.stop()
        log = server.log.read_text()
    assert "session created" in log
    assert "a caller does not show who it is" in log
    parts = [part for token in (issued, *wrong) for part in token.split(".") if len(part) > 8]
    for told in (OWNER_TOKEN, *parts, files.key.read_text().splitlines()[1]):
        assert told not in log
    for data in (bytes_of(secret), *map(bytes_of, model().values())):
        assert str(torch.frombuffer(bytearray(data), dtype=torch.float32)[0].item()) not in log
        assert base64.b64encode(data).decode() not in log
    assert "authorization" not in log.lower()


def test_a_unix_socket_is_its_user_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "optserve.sock"
    with running_server("--host", f"unix:{path}") as server:
        assert server.address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with StubDriver(server.address) as driver:
            _served(driver)
        second = _server("--host", f"unix:{path}", "--metrics-port", "0")
        assert second.returncode == 3
        assert "another server is there" in second.stderr
        with StubDriver(server.address) as driver:
            assert len(driver.sessions().sessions) == 1
        server.process.kill()
        server.process.wait()
    assert path.exists()  # Nobody could take it away.
    with running_server("--host", f"unix:{path}") as server, StubDriver(server.address) as driver:
        _served(driver)


def test_where_others_can_listen_it_serves_tls_or_says_that_it_does_not() -> None:
    refused_run = _server("--host", "0.0.0.0")
    assert refused_run.returncode == 2
    assert "allow_plaintext" in refused_run.stderr
    assert "Traceback" not in refused_run.stderr
    with running_server("--host", "0.0.0.0", "--allow-plaintext", "true") as server:
        assert "no TLS" in server.log.read_text()


def test_certificates_that_cannot_be_used_are_said_and_end_it(
    authority: Authority, tmp_path: Path
) -> None:
    files = ServerFiles.of(tmp_path, authority.server())
    files.key.write_bytes(authority.server().key)
    run = _server(*files.flags)
    assert run.returncode == 2
    assert f"{files.certificate} and {files.key} do not fit" in run.stderr
    assert "Traceback" not in run.stderr


def _server(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "optserve_server", "--device", "cpu", "--port", "0", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S * 3,
    )
