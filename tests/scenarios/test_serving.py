"""What a real process does beside sessions: health, reflection, and an end without harm."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import grpc
import pytest
from drivers import take
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from messages import chunks_of, headers_of
from refusals import refused, translated
from scenarios.models import create, gradients, spec
from server_process import STOP_TIMEOUT_S, ServerProcess, running_server

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

SERVICE = "optserve.v1.OptimizerService"
DRAIN_TIMEOUT_S = 20
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def own_server() -> Iterator[ServerProcess]:
    """Start a server for one test, to be stopped by it."""
    with running_server("--drain-timeout-s", str(DRAIN_TIMEOUT_S)) as process:
        yield process


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_told_when_asked_and_when_watched(channel: grpc.Channel, service: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request, timeout=TIMEOUT_S).status == SERVING
    watch = health.Watch(request, timeout=TIMEOUT_S)
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_of_an_unknown_service_is_not_found(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_lists_every_service(channel: grpc.Channel) -> None:
    listing = channel.unary_unary(
        "/grpc.health.v1.Health/List",
        request_serializer=health_pb2.HealthListRequest.SerializeToString,
        response_deserializer=health_pb2.HealthListResponse.FromString,
    )
    statuses = listing(health_pb2.HealthListRequest(), timeout=TIMEOUT_S).statuses
    assert statuses[SERVICE].status == statuses[""].status == SERVING


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_tells_the_services_and_their_files(channel: grpc.Channel, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    info = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed, file = info(iter(requests), timeout=TIMEOUT_S)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = file.file_descriptor_response.file_descriptor_proto
    assert any(b"optserve/v1/optimizer_service.proto" in each for each in files)


def test_the_catalogue_and_the_limits_are_told(server: ServerProcess) -> None:
    with StubDriver(server.address) as driver:
        catalogue = driver.stub.GetCatalogue(pb.GetCatalogueRequest(), timeout=TIMEOUT_S)
        info = driver.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
    adam = next(entry for entry in catalogue.optimizers if entry.name == "Adam")
    betas = next(each for each in adam.hyperparameters if each.name == "betas")
    assert (betas.type, betas.default) == ("double[]", "[0.9, 0.999]")
    assert (betas.constraint.at_least, betas.constraint.below, betas.constraint.count) == (0, 1, 2)
    for entry in (*catalogue.optimizers, *catalogue.schedulers, *catalogue.losses):
        assert entry.help
        assert all(each.help for each in entry.hyperparameters)
    gamma = next(e for e in catalogue.schedulers if e.name == "ExponentialLR").hyperparameters[0]
    assert (gamma.name, gamma.HasField("default")) == ("gamma", False)
    assert info.device == "cpu"
    assert info.limits.message_bytes_max == 4 << 20
    unset = [
        field.name
        for field in info.limits.DESCRIPTOR.fields
        if not getattr(info.limits, field.name)
    ]
    assert unset == [
        "request_rate_max",
        "tenant_sessions_max",
        "tenant_bytes_max",
        "tenant_disk_bytes_max",
    ]


def test_a_server_that_is_told_to_stop_tells_those_who_watch_and_those_who_rest(
    own_server: ServerProcess,
) -> None:
    with StubDriver(own_server.address) as driver, _watching(own_server) as statuses:
        session_id = create(driver, spec(SGD()))
        with driver.worker(session_id) as resting:
            take(resting, 1, gradients(1))
            assert next(statuses) == SERVING
            started = time.monotonic()
            own_server.process.send_signal(signal.SIGTERM)
            assert next(statuses) == NOT_SERVING
            with refused("DRAINING") as caught:
                take(resting, 2, gradients(2))
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        with refused("DRAINING"):
            create(driver, spec(SGD()))
        assert own_server.process.wait(STOP_TIMEOUT_S) == 0
        assert time.monotonic() - started < DRAIN_TIMEOUT_S / 2  # Nobody was waited for.


def test_a_server_that_is_told_to_stop_finishes_the_step_that_goes_on(
    own_server: ServerProcess,
) -> None:
    gradient = gradients(1)
    with StubDriver(own_server.address) as driver, _watching(own_server) as statuses:
        session_id = create(driver, spec(SGD()))
        requests: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        responses = driver.stub.Train(iter(requests.get, None), timeout=TIMEOUT_S)
        requests.put(pb.TrainRequest(open=pb.TrainOpen(session_id=session_id)))
        begin = pb.StepBegin(step=1, gradients=headers_of(gradient))
        requests.put(pb.TrainRequest(begin=begin))
        assert next(responses).HasField("opened")
        assert next(statuses) == SERVING
        time.sleep(0.2)  # Until the server has read `begin`.
        own_server.process.send_signal(signal.SIGTERM)
        assert next(statuses) == NOT_SERVING
        for chunks in chunks_of(gradient.values()):
            requests.put(pb.TrainRequest(chunks=chunks))
        requests.put(pb.TrainRequest(end=pb.StepEnd()))
        events = [next(responses).WhichOneof("event") for _ in range(3)]
        assert events == ["begin", "chunks", "result"]
        with refused("DRAINING"), translated():
            next(responses)
        requests.put(None)
        assert own_server.process.wait(STOP_TIMEOUT_S) == 0


def test_a_server_that_is_told_to_stop_does_not_wait_for_workers_that_cannot_come(
    own_server: ServerProcess,
) -> None:
    with StubDriver(own_server.address) as driver:
        session_id = create(driver, spec(SGD(), workers=2))
        with driver.worker(session_id, 0) as waiting, driver.worker(session_id, 1):
            answer = waiting.start(1, gradients(1))
            time.sleep(0.2)
            own_server.process.send_signal(signal.SIGTERM)
            with refused("DRAINING"):
                answer.result(TIMEOUT_S)
        assert own_server.process.wait(STOP_TIMEOUT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_still_goes_on(
    own_server: ServerProcess, number: signal.Signals
) -> None:
    with StubDriver(own_server.address) as driver:
        session_id = create(driver, spec(SGD()))
        requests: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        responses = driver.stub.Train(iter(requests.get, None), timeout=TIMEOUT_S)
        requests.put(pb.TrainRequest(open=pb.TrainOpen(session_id=session_id)))
        requests.put(pb.TrainRequest(begin=pb.StepBegin(step=1)))  # And then nothing.
        assert next(responses).HasField("opened")
        time.sleep(0.2)
        own_server.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            own_server.process.wait(1)
        started = time.monotonic()
        assert own_server.stop(number) == 0
        assert time.monotonic() - started < DRAIN_TIMEOUT_S / 2
        with pytest.raises(grpc.RpcError):
            next(responses)
        requests.put(None)


@contextmanager
def _watching(server: ServerProcess) -> Iterator[Iterator[int]]:
    """Watch the health of a server, which must stay in sight until it stops."""
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
        )
        yield (response.status for response in watch)
