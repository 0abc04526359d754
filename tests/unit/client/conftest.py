"""Both faces of the client: one test body is run through the blocking and the asyncio one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faces import Connect, Face, connecting
from server_process import ServerProcess

import optserve_client as optserve


@pytest.fixture(params=["blocking", "asyncio", "shared-memory"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Connect with either face, and in either lane unless the test itself says how."""
    lane: optserve.Lane = "shm" if request.param == "shared-memory" else "grpc"
    face: Face = "asyncio" if request.param == "asyncio" else "blocking"
    with connecting(face, optserve.ClientConfig(lane=lane)) as connect:
        yield connect


@pytest.fixture
def client(connect: Connect, server: ServerProcess) -> Iterator[optserve.Client]:
    """Yield a client of a real server, with either face and in either lane."""
    with connect(server.address) as client:
        yield client
