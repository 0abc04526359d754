"""Who the client is, and whom it believes: against a real server that is closed to strangers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority, ServerFiles, token_file
from faces import Connect, Face, connecting
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve_client import ClientConfig, Retry, Tls
from optserve_client._credentials import is_local, metadata_of

SGD = optserve.optim.SGD(lr=0.5)
ONES = np.ones(3, np.float32)
ALICE, BOB = "alice-has-a-long-token", "bob-has-another-one"
AT_ONCE = ClientConfig(retry=Retry.never())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what a client may be given."""
    folder = tmp_path_factory.mktemp("files")
    client = authority.client(common_name="carol")
    (folder / "ca.pem").write_bytes(authority.root)
    (folder / "other.pem").write_bytes(Authority().root)
    (folder / "client.pem").write_bytes(client.certificate)
    (folder / "client.key").write_bytes(client.key)
    return folder


@pytest.fixture(scope="module")
def closed(authority: Authority, files: Path) -> Iterator[ServerProcess]:
    """Serve those who have a token."""
    tokens = token_file(files / "tokens.toml", [("alice", ALICE), ("bob", BOB)])
    flags = [*ServerFiles.of(files, authority.server()).flags, "--tokens", str(tokens)]
    with running_server(*flags) as server:
        yield server


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    face: Face = request.param
    with connecting(face, AT_ONCE) as connect:
        yield connect


def config(files: Path, **options: Any) -> ClientConfig:  # noqa: ANN401
    options = {"tls": Tls(ca=files / "ca.pem"), "retry": Retry.never(), **options}
    return ClientConfig(**options)


@pytest.mark.parametrize("kind", ["text", "file", "call"])
def test_a_token_opens_what_is_closed_to_others(
    kind: str, connect: Connect, closed: ServerProcess, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{ALICE}\n")
    kinds: dict[str, optserve.Token] = {"text": ALICE, "file": path, "call": lambda: ALICE}
    token = kinds[kind]
    with (
        connect(closed.address, config=config(files, token=token)) as alice,
        alice.create_session({"w": ONES}, optimizer=SGD) as session,
        connect(closed.address, config=config(files, token=BOB)) as bob,
    ):
        assert session.step({"w": ONES}).step == 1
        with pytest.raises(optserve.SessionNotFoundError):
            bob.get_session(session.session_id)


def test_a_token_that_is_exchanged_is_sent_from_then_on(
    connect: Connect, closed: ServerProcess, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(ALICE)
    with connect(closed.address, config=config(files, token=path)) as client:
        session = client.create_session({"w": ONES}, optimizer=SGD)
        path.write_text("")  # It is being written.
        assert client.get_session(session.session_id).status.steps == 0
        path.write_text(BOB)
        with pytest.raises(optserve.SessionNotFoundError):
            client.get_session(session.session_id)
        path.write_text("wrong")
        with pytest.raises(optserve.UnauthenticatedError):
            client.server_info()
        path.unlink()
        with pytest.raises(optserve.UnauthenticatedError):
            client.server_info()
        path.write_text(ALICE)
        client.delete_session(session.session_id)


def test_a_certificate_opens_what_is_closed_to_others(
    connect: Connect, authority: Authority, files: Path
) -> None:
    own = Tls(ca=files / "ca.pem", certificate=files / "client.pem", key=str(files / "client.key"))
    flags = ServerFiles.of(files, authority.server()).flags
    with running_server(*flags, "--tls-client-ca", str(files / "ca.pem")) as server:
        with pytest.raises(optserve.UnavailableError):
            connect(server.address, config=config(files))
        with (
            connect(server.address, config=config(files, tls=own)) as carol,
            carol.create_session({"w": ONES}, optimizer=SGD) as session,
        ):
            assert session.step({"w": ONES}).step == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({}, optserve.UnauthenticatedError, id="nobody"),
        pytest.param({"token": "wrong"}, optserve.UnauthenticatedError, id="wrong-token"),
        pytest.param({"tls": None}, optserve.UnavailableError, id="plaintext"),
        pytest.param({"tls": Tls(), "token": ALICE}, optserve.UnavailableError, id="no-authority"),
    ],
)
def test_who_is_not_known_is_told_so(
    options: dict[str, Any],
    error: type[optserve.OptserveError],
    connect: Connect,
    closed: ServerProcess,
    files: Path,
) -> None:
    with pytest.raises(error), connect(closed.address, config=config(files, **options)) as client:
        list(client.list_sessions())


def test_a_server_that_nobody_vouches_for_gets_no_token(
    connect: Connect, closed: ServerProcess, files: Path
) -> None:
    stranger = Tls(ca=files / "other.pem")
    with pytest.raises(optserve.UnavailableError):
        connect(closed.address, config=config(files, tls=stranger, token=ALICE))


LOCAL = [
    *("localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "dns:///localhost:1"),
    *("ipv4:127.0.0.1:1", "ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1"),
    *("unix:/run/optserve.sock", "unix:///run/optserve.sock", "unix-abstract:optserve"),
]
ELSEWHERE = [
    *("example.org:1", "10.0.0.1:1", "[fe80::1]:1", "dns:///example.org:1", "localhost.evil.org:1"),
    *("ipv4:127.0.0.1:1,10.0.0.1:1", "dns://127.0.0.1/example.org:1", "", "127.0.0.1.evil.org:1"),
    *("xds:///localhost:1",),
]


@pytest.mark.parametrize("target", LOCAL)
def test_what_stays_on_this_host_is_local(target: str) -> None:
    assert is_local(target)
    assert metadata_of(target, ClientConfig(token=ALICE))() == (
        ("authorization", f"Bearer {ALICE}"),
    )


@pytest.mark.parametrize("target", ELSEWHERE)
def test_no_token_goes_where_anybody_could_read_it(target: str, connect: Connect) -> None:
    assert not is_local(target)
    with pytest.raises(ValueError, match="anybody could read the token"):
        connect(target, config=ClientConfig(token=ALICE))
    for option in ({"tls": Tls()}, {"allow_plaintext_token": True}):
        assert metadata_of(target, ClientConfig(token=ALICE, **option))()


MISTAKES: dict[str, Callable[[], object]] = {
    "key-alone": lambda: Tls(key="x"),
    "certificate-alone": lambda: Tls(certificate="x"),
    "negative-patience": lambda: Retry(give_up_after_s=-1),
    "endless-patience": lambda: Retry(give_up_after_s=float("inf")),
    "shrinking-waits": lambda: Retry(backoff_factor=0.5),
    "too-much-chance": lambda: Retry(jitter=1.5),
    "no-keepalive": lambda: ClientConfig(keepalive_s=0),
}


@pytest.mark.parametrize("make", MISTAKES.values(), ids=MISTAKES.keys())
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|only together"):
        make()


def test_a_token_is_not_shown() -> None:
    assert ALICE not in repr(ClientConfig(token=ALICE))


def test_files_that_cannot_be_read_are_told_of_at_once(connect: Connect, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for options in ({"token": nothing}, {"tls": Tls(ca=nothing)}):
        with pytest.raises(FileNotFoundError):
            connect("localhost:1", config=ClientConfig(**options))
