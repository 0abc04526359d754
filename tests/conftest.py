"""What tests of several folders share: a real server, and the ways to reach a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drivers import Driver
from drivers_core import CoreDriver
from drivers_durable import durable_drivers
from drivers_forms import FormDriver
from drivers_grpc import StubDriver, served_in_process
from drivers_shared import SharedDriver
from hypothesis import settings
from server_process import ServerProcess, running_server

# How long an example takes says how busy the machine is; a test that hangs has a timeout.
settings.register_profile("optserve", deadline=None)
settings.load_profile("optserve")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """Start one real server for the whole run."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="session")
def core_driver() -> Iterator[Driver]:
    """Drive the core, without gRPC."""
    with CoreDriver() as driver:
        yield driver


@pytest.fixture(scope="session")
def grpc_address() -> Iterator[str]:
    """Serve gRPC in this process."""
    with served_in_process() as address:
        yield address


@pytest.fixture(scope="session")
def grpc_driver(grpc_address: str) -> Iterator[Driver]:
    """Drive a gRPC server in this process."""
    with StubDriver(grpc_address) as driver:
        yield driver


@pytest.fixture(scope="session")
def whole_driver(grpc_address: str) -> Iterator[Driver]:
    """Drive it with steps that announce no gradients, if there is one for every parameter."""
    with FormDriver(grpc_address, "every-parameter") as driver:
        yield driver


@pytest.fixture(scope="session")
def packed_driver(grpc_address: str) -> Iterator[Driver]:
    """Drive it with steps in one message, if they are small and whole."""
    with FormDriver(grpc_address, "packed") as driver:
        yield driver


@pytest.fixture(scope="session")
def process_driver(server: ServerProcess) -> Iterator[StubDriver]:
    """Drive a real server process."""
    with StubDriver(server.address) as driver:
        yield driver


@pytest.fixture(scope="session")
def shared_driver(server: ServerProcess) -> Iterator[SharedDriver]:
    """Drive a real server process whose memory is shared."""
    with SharedDriver(server.address) as driver:
        yield driver


@pytest.fixture(scope="session")
def durable_driver() -> Iterator[Driver]:
    """Drive a server whose sessions have journals, and are parked whenever nobody uses them."""
    with durable_drivers() as driver:
        yield driver


@pytest.fixture(params=["core", "grpc", "whole", "packed", "process", "shared", "durable"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Run a scenario through every driver."""
    chosen: Driver = request.getfixturevalue(f"{request.param}_driver")
    return chosen
