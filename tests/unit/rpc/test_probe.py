from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse

from optserve_server.rpc.probe import main


@pytest.fixture
def health() -> HealthServicer:
    return HealthServicer()


@pytest.fixture
def address(health: HealthServicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_server_that_serves_passes(health: HealthServicer, address: str) -> None:
    health.set("", HealthCheckResponse.SERVING)
    assert main([address]) == 0


def test_a_server_that_drains_fails_with_its_status(health: HealthServicer, address: str) -> None:
    health.set("", HealthCheckResponse.NOT_SERVING)
    assert main([address]) == f"{address}: NOT_SERVING"


def test_no_server_fails_with_the_reason() -> None:
    assert "UNAVAILABLE" in str(main(["127.0.0.1:1"]))


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1:1", "127.0.0.1:2"]], ids=len)
def test_it_takes_exactly_one_address(
    addresses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(addresses)
    assert capsys.readouterr().err.startswith("usage: ")


def test_a_file_that_cannot_be_read_is_named() -> None:
    assert "/no/such/file" in str(main(["127.0.0.1:1", "--tls-ca", "/no/such/file"]))


def test_as_a_command_it_exits_with_0_or_1_and_needs_no_torch(
    health: HealthServicer, address: str
) -> None:
    health.set("", HealthCheckResponse.SERVING)
    # A health check runs every few seconds; loading torch would cost it seconds of CPU time.
    command = (
        "import sys; from optserve_server.rpc import probe;"
        "assert 'torch' not in sys.modules; sys.exit(probe.main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", command, address], check=False)
    assert run.returncode == 0
    module = [sys.executable, "-m", "optserve_server.rpc.probe"]
    assert subprocess.run([*module, address], check=False).returncode == 0
    refused = subprocess.run([*module, "127.0.0.1:1"], check=False, capture_output=True)
    assert refused.returncode == 1
    assert refused.stdout == b""
