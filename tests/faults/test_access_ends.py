"""What a caller has shown ends in the middle of a call: so does the call, at its next message."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from certificates import token_file
from drivers import take
from faces import Connect, connecting
from faults.ground import rich_spec
from faults.strangers import (
    LEEWAY_S,
    OWNER,
    OWNER_TOKEN,
    ChannelDriver,
    ClosedGround,
    closed_ground,
)
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from messages import bytes_of, chunks_of, headers_of
from refusals import RefusedError, refused, translated
from scenarios.models import gradients, model, spec
from server_process import running_server
from streams import raw_stream, reopened_stream

import optserve_client as optserve
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

BRIEF_S = 3  # Enough to open a stream on a busy machine.
TIMEOUT_S = 30.0
LOOK_S = 1.5  # Files are read again a second after they were.
LARGE_ELEMENTS = 16 << 20  # 64 MiB: more than gRPC takes of an answer that nobody reads.


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedGround]:
    with closed_ground(tmp_path_factory.mktemp("closed")) as ground:
        yield ground


@pytest.fixture
def session_id(closed: ClosedGround) -> Iterator[str]:
    driver = closed.where.driver
    session_id = driver.create(rich_spec(), model()).status.session_id
    yield session_id
    driver.delete(session_id)


class Brief:
    """A token of the provider that expires in a moment, and a channel that shows it."""

    def __init__(self, closed: ClosedGround) -> None:
        self._closed = closed
        self.token = closed.provider.token(OWNER, exp=time.time() - LEEWAY_S + BRIEF_S)
        self.channel = closed.channel(token=self.token)
        self.driver = ChannelDriver(self.channel)

    def wait_for_end(self) -> None:
        """Wait until no call is let in with it any more."""
        deadline = time.monotonic() + TIMEOUT_S
        with self._closed.channel(token=self.token) as channel:
            driver = ChannelDriver(channel)
            while not _is_refused(driver.sessions):
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.fixture
def brief(closed: ClosedGround) -> Iterator[Brief]:
    brief = Brief(closed)
    with brief.channel:
        yield brief


def _is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except RefusedError as error:
        return error.reason == "UNAUTHENTICATED"
    return False


def check_told(error: RefusedError) -> None:
    """Make sure that it says what, when, and what to do."""
    assert error.code is grpc.StatusCode.UNAUTHENTICATED
    assert "the token has expired at 20" in error.message
    assert "call again" in error.message
    assert error.retry_after_s == 0  # Which no call is told that was not let in.


def test_a_stream_ends_at_the_first_message_after_its_token(
    closed: ClosedGround, session_id: str, brief: Brief
) -> None:
    with raw_stream(brief.driver, session_id) as stream:
        stream.step(1, list(gradients(1).values()))
        brief.wait_for_end()
        before = closed.where.driver.download(session_id)
        stream.begin(2)
        with refused("UNAUTHENTICATED") as caught:
            stream.receive()
        check_told(caught.value)
    after = closed.where.driver.download(session_id)
    assert {name: bytes_of(value) for name, value in after.items()} == {
        name: bytes_of(value) for name, value in before.items()
    }
    with closed.where.driver.worker(session_id) as worker:
        take(worker, 2, gradients(2))


def test_a_step_that_its_token_ends_in_is_given_up(
    closed: ClosedGround, session_id: str, brief: Brief
) -> None:
    chunks = list(chunks_of(gradients(1).values()))
    with raw_stream(brief.driver, session_id) as stream:
        stream.begin(1)
        stream.chunks(chunks[:1])
        brief.wait_for_end()
        stream.end()
        with refused("UNAUTHENTICATED") as caught:
            stream.receive()
        check_told(caught.value)
    assert closed.where.driver.get(session_id).status.steps == 0
    with reopened_stream(closed.where.driver, session_id) as stream:
        assert stream.step(1, list(gradients(1).values())).result


def test_who_waits_for_other_workers_has_the_answer_and_then_no_more(
    closed: ClosedGround, brief: Brief
) -> None:
    owner = closed.where.driver
    pair = spec(SGD(lr=0.5), workers=2)
    session_id = owner.create(pair, model()).status.session_id
    with brief.driver.worker(session_id, 0) as expiring, owner.worker(session_id, 1) as other:
        waiting = expiring.start(1, gradients(1))
        deadline = time.monotonic() + TIMEOUT_S
        while owner.contribution(session_id, 0).contribution.step < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        brief.wait_for_end()
        take(other, 1, gradients(1))
        assert waiting.result(TIMEOUT_S).result.step == 1
        with refused("UNAUTHENTICATED"):
            take(expiring, 2, gradients(2))
    owner.delete(session_id)


def test_an_upload_that_its_token_ends_in_changes_nothing(
    closed: ClosedGround, session_id: str, brief: Brief
) -> None:
    values = {name: value + 1 for name, value in model().items()}

    def requests() -> Iterator[pb.UploadParametersRequest]:
        begin = pb.UploadBegin(session_id=session_id, parameters=headers_of(values))
        yield pb.UploadParametersRequest(begin=begin)
        brief.wait_for_end()
        for chunks in chunks_of(values.values()):
            yield pb.UploadParametersRequest(chunks=chunks)

    with refused("UNAUTHENTICATED") as caught, translated():
        brief.driver.stub.UploadParameters(requests(), timeout=TIMEOUT_S)
    check_told(caught.value)
    kept = closed.where.driver.download(session_id)
    assert {name: bytes_of(value) for name, value in kept.items()} == {
        name: bytes_of(value) for name, value in model().items()
    }


def test_a_download_that_its_token_ends_in_does_not_come_to_its_end(closed: ClosedGround) -> None:
    owner = closed.where.driver
    large = {"w": torch.zeros(LARGE_ELEMENTS)}
    session_id = owner.create(spec(SGD(lr=0.5), parameters=large)).status.session_id
    owner.upload(session_id, large)
    brief = Brief(closed)
    with brief.channel:
        request = pb.DownloadParametersRequest(session_id=session_id)
        answers: Iterator[Message] = brief.driver.stub.DownloadParameters(
            request, timeout=TIMEOUT_S
        )
        next(answers)
        brief.wait_for_end()
        with refused("UNAUTHENTICATED") as caught, translated():
            list(answers)
        check_told(caught.value)
    owner.delete(session_id)


@pytest.fixture(params=["blocking", "asyncio"])
def connect(
    request: pytest.FixtureRequest, closed: ClosedGround, tmp_path: Path
) -> Iterator[Connect]:
    (tmp_path / "ca.pem").write_bytes(closed.authority.root)
    with connecting(request.param, optserve.ClientConfig()) as connect:
        yield connect


def _with_token(tmp_path: Path, token: optserve.Token) -> dict[str, object]:
    tls = optserve.Tls(ca=tmp_path / "ca.pem")
    return {"config": optserve.ClientConfig(tls=tls, lane="grpc", token=token)}


@pytest.mark.parametrize("elements", [8, 1 << 20], ids=["packed", "chunked"])
def test_a_client_whose_source_has_another_token_goes_on_by_itself(
    elements: int, closed: ClosedGround, connect: Connect, brief: Brief, tmp_path: Path
) -> None:
    tokens = [brief.token]
    options = _with_token(tmp_path, lambda: tokens[-1])
    with connect(closed.address, **options) as client:
        session = client.create_session(
            {"w": np.zeros(elements, np.float32)}, optimizer=optserve.optim.SGD(lr=1.0)
        )
        assert session.step({"w": np.ones(elements, np.float32)}).step == 1
        tokens.append(closed.provider.token(OWNER))
        brief.wait_for_end()
        assert session.step({"w": np.ones(elements, np.float32)}).step == 2
        assert (session.parameters["w"] == -2).all()
        assert session.status().steps == 2
        session.delete()


def test_a_client_that_has_no_other_token_is_told(
    closed: ClosedGround, connect: Connect, brief: Brief, tmp_path: Path
) -> None:
    with connect(closed.address, **_with_token(tmp_path, brief.token)) as client:
        session = client.create_session(
            {"w": np.zeros(8, np.float32)}, optimizer=optserve.optim.SGD(lr=1.0)
        )
        session.step({"w": np.ones(8, np.float32)})
        brief.wait_for_end()
        with pytest.raises(optserve.UnauthenticatedError) as caught:
            session.step({"w": np.ones(8, np.float32)})
        assert caught.value.retry_after_s is None  # It has tried, and was not let in.
        session_id = session.session_id
    assert closed.where.driver.delete(session_id).steps == 1


def test_a_token_that_is_taken_back_ends_its_streams_and_no_others(tmp_path: Path) -> None:
    with closed_ground(tmp_path) as closed:
        path, driver = tmp_path / "tokens.toml", closed.where.driver
        other = driver.create(rich_spec(), model()).status.session_id
        token_file(path, [(OWNER, OWNER_TOKEN), (OWNER, "another")])
        time.sleep(LOOK_S)
        with (
            closed.channel(token="another") as channel,
            raw_stream(ChannelDriver(channel), other) as kept,
            raw_stream(driver, closed.where.session_id) as stream,
        ):
            token_file(path, [(OWNER, "another")])
            time.sleep(LOOK_S)
            stream.begin(2)
            with refused("UNAUTHENTICATED") as caught:
                stream.receive()
            assert "the token was taken back" in caught.value.message
            assert caught.value.retry_after_s == 0
            assert kept.step(1, list(gradients(1).values())).result


def test_a_watch_that_its_token_ends_in_is_not_told_what_comes_next(tmp_path: Path) -> None:
    path = token_file(tmp_path / "tokens.toml", [(OWNER, OWNER_TOKEN)])
    shown = (("authorization", f"Bearer {OWNER_TOKEN}"),)
    with (
        running_server("--tokens", str(path)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch = HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), metadata=shown, timeout=TIMEOUT_S
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        token_file(path, [])
        time.sleep(LOOK_S)
        server.process.send_signal(signal.SIGTERM)  # Whose watchers are told, in its first moment.
        with refused("UNAUTHENTICATED") as caught, translated():
            next(watch)
        assert "the token was taken back" in caught.value.message
        assert server.process.wait(TIMEOUT_S) == 0
