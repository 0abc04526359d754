"""Strangers get nothing: every rpc that is served, and everything that one may come with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from faults.ground import OF_CHECKPOINTS, rich_spec
from faults.strangers import (
    NEIGHBOUR,
    OWNER,
    OWNER_TOKEN,
    TIMEOUT_S,
    ChannelDriver,
    ClosedGround,
    call,
    closed_ground,
    names_session,
    reason_of,
    request_for,
)
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from refusals import RefusedError, refused

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
OF_SESSIONS = {
    method.name: method
    for method in SERVICE.methods
    if names_session(method.input_type) and method.name not in OF_CHECKPOINTS
}
OF_NO_SESSION = {"CreateSession", "ListSessions", "GetCatalogue", "GetServerInfo"}


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
    walked = {method.name for method in SERVICE.methods} - OF_NO_SESSION - OF_CHECKPOINTS
    assert walked == set(OF_SESSIONS)


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
    before, messages = by_token.where.look(), {}
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
    assert by_token.where.look() == before


@pytest.mark.parametrize(("service", "method"), GUARDED)
def test_who_shows_no_certificate_or_another_authority_s_is_not_connected(
    service: str, method: MethodDescriptor, by_certificate: ClosedGround
) -> None:
    request = request_for(method.input_type, by_certificate.where.session_id)
    before = by_certificate.where.look()
    for certificate in (None, Authority().client(common_name=OWNER)):
        channel = by_certificate.channel(client=certificate)
        with channel, pytest.raises(RefusedError) as caught:
            call(channel, method, request, service=service)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert by_certificate.where.look() == before


@pytest.mark.parametrize("method", OF_SESSIONS.values(), ids=OF_SESSIONS)
def test_another_tenant_s_session_is_answered_as_one_that_is_not_there(
    method: MethodDescriptor, closed: ClosedGround
) -> None:
    before = closed.where.look()
    with closed.neighbour() as channel:
        foreign = _refusal(channel, method, closed.where.session_id)
        unknown = _refusal(channel, method, secrets.token_hex(16))
    assert foreign.reason == "SESSION_NOT_FOUND"
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    assert _without_id(foreign) == _without_id(unknown)
    assert closed.where.look() == before


@pytest.mark.parametrize("method", OF_SESSIONS.values(), ids=OF_SESSIONS)
def test_what_strangers_are_refused_reaches_the_session_of_its_owner(
    method: MethodDescriptor, closed: ClosedGround
) -> None:
    """Or what another tenant is answered would prove nothing."""
    driver = closed.where.driver
    session_id = driver.create(rich_spec()).status.session_id
    reason = reason_of(closed.where.channel, method, request_for(method.input_type, session_id))
    assert reason not in ("", "SESSION_NOT_FOUND", "UNAUTHENTICATED", "INTERNAL")
    if method.name == "DeleteSession":
        with refused("SESSION_NOT_FOUND"):
            driver.get(session_id)
    else:
        driver.delete(session_id)


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


def _refusal(channel: grpc.Channel, method: MethodDescriptor, session_id: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call(channel, method, request_for(method.input_type, session_id))
    assert caught.value.actual == session_id
    return caught.value


def _without_id(error: RefusedError) -> dict[str, object]:
    """Return all that a refusal says, but for the id that was asked for."""
    return {**vars(error), "actual": "", "args": error.args, "text": str(error)}
