"""Strangers get nothing: every rpc that is served, and everything that one may come with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import grpc
import pytest
from certificates import Authority
from faults.checkpointing import Checkpoints
from faults.ground import rich_spec
from faults.strangers import (
    CHECKPOINT,
    NEIGHBOUR,
    OWNER,
    OWNER_TOKEN,
    TIMEOUT_S,
    ChannelDriver,
    ClosedGround,
    call,
    closed_ground,
    reason_of,
    request_for,
)
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from refusals import RefusedError, refused
from scenarios.models import model

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_server.rpc import probe
from optserve_server.rpc.server import SERVICE

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
OPEN = {f"{HEALTH.full_name}/Check"}
"""What is for everybody."""

SERVICES = {
    SERVICE.full_name: SERVICE,
    HEALTH.full_name: HEALTH,
    "grpc.reflection.v1alpha.ServerReflection": REFLECTION,
    "grpc.reflection.v1.ServerReflection": REFLECTION,
}
"""Everything that is served, says a test."""

GUARDED = [
    pytest.param(name, method, id=path)
    for name, service in SERVICES.items()
    for method in service.methods
    if (path := f"{name}/{method.name}") not in OPEN
]
FOREIGN = {
    **dict.fromkeys(
        (
            *("GetSession", "UpdateSession", "DeleteSession", "UploadParameters"),
            *("DownloadParameters", "Train", "Step", "GetContribution", "EndEpoch"),
            *("EvaluateLoss", "EvaluateLossStream", "ListLossPoints", "SaveCheckpoint"),
        ),
        "SESSION_NOT_FOUND",
    ),
    "ListCheckpoints": "OK",  # There is none: says a test.
    **dict.fromkeys(
        ("RestoreCheckpoint", "DownloadCheckpoint", "DeleteCheckpoint"), "CHECKPOINT_NOT_FOUND"
    ),
}
"""What is answered to who names what another tenant has, by method: a new one needs a row."""

OF_NOBODY = {"CreateSession", "ListSessions", "GetCatalogue", "GetServerInfo"}
"""Methods that name nothing that somebody has."""

NAMES: Mapping[str, Callable[[str], str]] = {
    "unknown": lambda _: secrets.token_hex(16),
    "empty": lambda _: "",
    "in-capitals": str.upper,
    "cut-off": lambda session_id: session_id[:-1],
    "with-more": lambda session_id: session_id + "0",
    "with-a-path": lambda session_id: f"../sessions/{session_id}",
    "of-another-script": lambda _: "\N{ARABIC-INDIC DIGIT ONE}" * 16,
}
"""Ids that are no session's, by what they are made of."""


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedGround]:
    with closed_ground(tmp_path_factory.mktemp("closed")) as ground:
        yield ground


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedGround]:
    with closed_ground(tmp_path_factory.mktemp("closed"), certificates=True) as ground:
        yield ground


@pytest.fixture(params=["by_token", "by_certificate"])
def closed(request: pytest.FixtureRequest) -> ClosedGround:
    ground: ClosedGround = request.getfixturevalue(request.param)
    return ground


def test_the_walk_leaves_out_nothing_that_is_served(closed: ClosedGround) -> None:
    (method,) = REFLECTION.methods
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = call(closed.where.channel, method, request)
    assert isinstance(answer, reflection_pb2.ServerReflectionResponse)
    assert {each.name for each in answer.list_services_response.service} == set(SERVICES)
    assert {method.name for method in SERVICE.methods} == FOREIGN.keys() | OF_NOBODY


@pytest.mark.parametrize(("service", "method"), GUARDED)
def test_who_does_not_show_a_token_that_is_accepted_gets_nothing(
    service: str, method: MethodDescriptor, by_token: ClosedGround
) -> None:
    bad = {"unknown": secrets.token_urlsafe(32), **by_token.provider.bad_tokens()}
    headers = {
        "no token": (),
        "two tokens": (("authorization", f"Bearer {OWNER_TOKEN}"),) * 2,
        "another scheme": (("authorization", f"Basic {OWNER_TOKEN}"),),
        "no scheme": (("authorization", OWNER_TOKEN),),
        "no more than a scheme": (("authorization", "Bearer "),),
        **{name: (("authorization", f"Bearer {token}"),) for name, token in bad.items()},
    }
    request = request_for(method.input_type, by_token.where.session_id)
    before, messages = by_token.look(), {}
    with by_token.channel() as channel:
        for name, metadata in headers.items():
            with pytest.raises(RefusedError) as caught:
                call(channel, method, request, service=service, metadata=metadata)
            error = caught.value
            assert error.reason == "UNAUTHENTICATED", name
            assert error.code is grpc.StatusCode.UNAUTHENTICATED
            assert by_token.where.session_id not in str(error)
            messages[name] = error.message
    assert len({messages[name] for name in bad}) == 1  # It does not say what is wrong with it.
    assert by_token.look() == before


@pytest.mark.parametrize(("service", "method"), GUARDED)
def test_who_shows_no_certificate_or_another_authority_s_is_not_connected(
    service: str, method: MethodDescriptor, by_certificate: ClosedGround
) -> None:
    request = request_for(method.input_type, by_certificate.where.session_id)
    before = by_certificate.look()
    for certificate in (None, Authority().client(common_name=OWNER)):
        channel = by_certificate.channel(client=certificate)
        with channel, pytest.raises(RefusedError) as caught:
            call(channel, method, request, service=service)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert by_certificate.look() == before


@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_tenant_has_is_answered_as_what_is_not_there(
    name: str, closed: ClosedGround
) -> None:
    session_id = closed.where.session_id
    before = closed.look()
    with closed.neighbour() as channel:
        foreign = _answer(channel, name, session_id)
        forged = {kind: _answer(channel, name, forge(session_id)) for kind, forge in NAMES.items()}
    reason, *rest = foreign
    assert reason == FOREIGN[name]
    assert forged.pop("unknown") == foreign  # To the last byte of the trailers.
    del forged["empty"]  # Which names nothing: of one method it asks for all.
    assert {kind: each[0] for kind, each in forged.items()} == dict.fromkeys(forged, reason), rest
    assert closed.look() == before


@pytest.mark.parametrize("name", FOREIGN)
def test_what_strangers_are_refused_reaches_what_its_owner_has(
    name: str, closed: ClosedGround
) -> None:
    """Or what another tenant is answered would prove nothing."""
    driver = closed.where.driver
    checkpoints = Checkpoints(driver)
    session_id = driver.create(rich_spec(), model()).status.session_id
    if name != "SaveCheckpoint":
        checkpoints.save(session_id, CHECKPOINT)
    with closed.neighbour() as channel:
        foreign = _answer(channel, name, session_id)
    own = _answer(closed.where.channel, name, session_id)
    assert own != foreign
    assert own[0] not in ("", FOREIGN["GetSession"], FOREIGN["DeleteCheckpoint"])
    assert own[0] not in ("UNAUTHENTICATED", "INTERNAL")
    left = {each.session_id for each in driver.sessions().sessions} - {closed.where.session_id}
    assert (session_id in left) == (name != "DeleteSession")
    assert checkpoints.names(session_id) == [CHECKPOINT] * (name != "DeleteCheckpoint")
    for each in left:
        driver.delete(each)
    for saved in checkpoints.page(session_id).checkpoints:
        checkpoints.delete(session_id, saved.name)


def test_a_tenant_lists_its_own_checkpoints_alone(closed: ClosedGround) -> None:
    _, before = closed.look()
    with closed.neighbour() as channel:
        checkpoints, neighbour = Checkpoints(ChannelDriver(channel)), ChannelDriver(channel)
        for session_id in ("", closed.where.session_id):
            assert checkpoints.page(session_id) == pb.ListCheckpointsResponse()
        own = neighbour.create(rich_spec(), model()).status.session_id
        checkpoints.save(own, CHECKPOINT)
        assert [each.session_id for each in checkpoints.page().checkpoints] == [own]
        assert closed.look()[1] == before
        checkpoints.delete(own, CHECKPOINT)
        neighbour.delete(own)


def test_a_tenant_lists_its_own_sessions_alone(closed: ClosedGround) -> None:
    with closed.neighbour() as channel:
        neighbour = ChannelDriver(channel)
        assert not neighbour.sessions().sessions
        own = neighbour.create(rich_spec()).status.session_id
        listed = [status.session_id for status in neighbour.sessions().sessions]
        assert listed == [own]
        assert own not in [each.session_id for each in closed.where.look().sessions]
        with refused("SESSION_NOT_FOUND"):
            closed.where.driver.delete(own)
        neighbour.delete(own)


def test_pages_of_a_tenant_hold_no_gaps_for_others(closed: ClosedGround) -> None:
    with closed.neighbour() as channel:
        neighbour = ChannelDriver(channel)
        own = []
        for _ in range(3):
            own.append(neighbour.create(rich_spec()).status.session_id)
            other = closed.where.driver.create(rich_spec()).status.session_id
            closed.where.driver.delete(other)
        first = neighbour.sessions(page_size=2)
        second = neighbour.sessions(page_size=2, page_token=first.next_page_token)
        listed = [each.session_id for page in (first, second) for each in page.sessions]
        assert listed == own
        assert not second.next_page_token
        for session_id in own:
            neighbour.delete(session_id)


def test_what_a_tenant_calls_a_request_is_its_own_affair(closed: ClosedGround) -> None:
    """Or who guesses an id would be answered with another's session, or learn that it is taken."""
    request = pb.CreateSessionRequest(spec=rich_spec(), request_id="the-first")
    owner = OptimizerServiceStub(closed.where.channel)
    theirs = owner.CreateSession(request, timeout=TIMEOUT_S).session.status.session_id
    with closed.neighbour() as channel:
        neighbour = OptimizerServiceStub(channel)
        request.spec.display_name = "another"
        own = neighbour.CreateSession(request, timeout=TIMEOUT_S).session.status.session_id
        assert own != theirs
        ChannelDriver(channel).delete(own)
    closed.where.driver.delete(theirs)


def test_health_is_told_to_everybody_who_can_connect(by_token: ClosedGround) -> None:
    with by_token.channel() as channel:
        answer = call(channel, HEALTH.methods_by_name["Check"], health_pb2.HealthCheckRequest())
    assert answer == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize(("service", "method"), GUARDED)
def test_whoever_is_known_is_let_into_everything(
    service: str, method: MethodDescriptor, closed: ClosedGround
) -> None:
    request = request_for(method.input_type, "")
    if isinstance(request, reflection_pb2.ServerReflectionRequest):
        request.list_services = ""
    with closed.neighbour() as channel:
        reason = reason_of(channel, method, request, service=service)
    assert reason not in ("", "UNAUTHENTICATED", "INTERNAL")


def test_a_token_of_the_provider_is_as_good_as_one_of_the_operator(by_token: ClosedGround) -> None:
    session_id = by_token.where.session_id
    with by_token.channel(token=by_token.provider.token(OWNER)) as channel:
        assert ChannelDriver(channel).get(session_id).status.session_id == session_id
    with (
        by_token.channel(token=by_token.provider.token(NEIGHBOUR)) as channel,
        refused("SESSION_NOT_FOUND"),
    ):
        ChannelDriver(channel).get(session_id)


def test_a_clock_may_be_wrong_by_as_much_as_is_allowed(by_token: ClosedGround) -> None:
    token = by_token.provider.token(exp=time.time() - 1)
    with by_token.channel(token=token) as channel:
        ChannelDriver(channel).get(by_token.where.session_id)


def test_a_certificate_without_a_common_name_says_by_its_only_other_name_who_calls(
    by_certificate: ClosedGround,
) -> None:
    where, authority = by_certificate.where, by_certificate.authority
    with by_certificate.channel(client=authority.client(OWNER)) as channel:
        ChannelDriver(channel).get(where.session_id)
    with (
        by_certificate.channel(client=authority.client(OWNER, NEIGHBOUR)) as channel,
        refused("UNAUTHENTICATED"),
    ):
        ChannelDriver(channel).get(where.session_id)


def test_who_tries_many_tokens_does_not_fill_the_log(
    by_token: ClosedGround, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        with (
            by_token.channel(token=secrets.token_urlsafe(32)) as channel,
            refused("UNAUTHENTICATED"),
        ):
            ChannelDriver(channel).sessions()
    assert len([each for each in caplog.records if "who it is" in each.message]) <= 2


def test_a_probe_shows_a_certificate_where_every_client_must(
    by_certificate: ClosedGround, tmp_path: Path
) -> None:
    root, certificate, key = (tmp_path / name for name in ("root.pem", "own.pem", "own.key"))
    own = by_certificate.authority.client(common_name="probe")
    root.write_bytes(by_certificate.authority.root)
    certificate.write_bytes(own.certificate)
    key.write_bytes(own.key)
    trusting = [by_certificate.address, "--tls-ca", str(root)]
    showing = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    assert "UNAVAILABLE" in str(probe.main([by_certificate.address]))
    assert "UNAVAILABLE" in str(probe.main(trusting))
    assert "UNAVAILABLE" in str(probe.main([*trusting, *showing, "--tls-name", "other.example"]))
    assert probe.main([*trusting, *showing]) == 0
    assert probe.main([*trusting, *showing, "--tls-name", "localhost"]) == 0


def _answer(channel: grpc.Channel, name: str, session_id: str) -> tuple[object, ...]:
    """Return all that a caller is told, but for the id that was asked for."""
    method = SERVICE.methods_by_name[name]
    try:
        answer = call(channel, method, request_for(method.input_type, session_id))
    except RefusedError as error:
        ended = cast("grpc.Call", error.__cause__)
        told = [
            (key, value if isinstance(value, bytes) else value.encode())
            for key, value in ended.trailing_metadata() or ()
        ]
        asked = session_id.encode()
        trailers = [(key, value.replace(asked, b"ID") if asked else value) for key, value in told]
        text = (ended.details() or "").replace(session_id, "ID")
        return error.reason, ended.code(), text, sorted(trailers)
    return "OK", answer
