"""A call that ends while the client is still sending: the client says why it ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from event_loop import TIMEOUT_S
from faces import Connect
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_client import ClientConfig, aio

SGD = optserve.optim.SGD(lr=0.5)
LARGE = np.ones(4 << 20, np.float32)  # 16 MiB: far more than the network takes at once.
GRPC = ClientConfig(lane="grpc", step_timeout_s=TIMEOUT_S, retry=optserve.Retry.never())


@pytest.fixture
def keeper(server: ServerProcess) -> Iterator[optserve.Client]:
    """Yield a client that interferes."""
    with optserve.connect(server.address, progress=False) as keeper:
        yield keeper


@pytest.mark.parametrize("moment", range(8))
def test_a_session_that_is_deleted_while_gradients_are_sent_says_so(
    connect: Connect, server: ServerProcess, keeper: optserve.Client, moment: int
) -> None:
    with connect(server.address, config=GRPC, progress=False) as client:
        session = client.create_session({"w": LARGE}, optimizer=SGD)
        session.open()
        timer = threading.Timer(0.006 * moment, keeper.delete_session, [session.session_id])
        timer.start()
        # The second, if it was deleted between two steps.
        expected = (optserve.SessionDeletedError, optserve.SessionNotFoundError)
        with pytest.raises(expected):  # noqa: PT012 - whichever step it is.
            for _ in range(100):
                session.step({"w": LARGE})
        timer.join()


@pytest.mark.parametrize("size", [0, 1, 4])
def test_an_upload_that_is_refused_while_it_is_sent_says_why(
    connect: Connect, server: ServerProcess, keeper: optserve.Client, size: int
) -> None:
    with connect(server.address, progress=False) as client:
        large = LARGE[: size << 20]
        for _ in range(4):
            session = client.create_session({"w": large}, optimizer=SGD)
            keeper.delete_session(session.session_id)
            with pytest.raises(optserve.SessionNotFoundError):
                session.upload({"w": large})


def test_a_server_that_dies_while_gradients_are_sent_is_unavailable() -> None:
    async def play(server: ServerProcess) -> list[object]:
        async with aio.connect(server.address, config=GRPC, progress=False) as client:
            sessions = [await client.create_session({"w": LARGE}, optimizer=SGD) for _ in range(6)]
            for session in sessions:
                await session.open()
            steps = [asyncio.create_task(each.step({"w": LARGE})) for each in sessions]
            await asyncio.sleep(0.02)
            server.process.kill()
            return await asyncio.gather(*steps, return_exceptions=True)

    with running_server() as server:
        came = asyncio.run(asyncio.wait_for(play(server), TIMEOUT_S))
        server.process.wait(TIMEOUT_S)
    # The second, of a step that gRPC had taken as a whole.
    allowed = (optserve.UnavailableError, optserve.StepUnknownError)
    assert all(isinstance(each, allowed) for each in came), came


def test_a_fault_of_the_server_is_told_as_such(connect: Connect) -> None:
    """It has the very status that grpc.aio makes up, and nothing else will come."""

    def at_fault(_request: object, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.INTERNAL, "a fault")

    service = pb.DESCRIPTOR.services_by_name["OptimizerService"].full_name
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(at_fault)
    handlers = {"GetServerInfo": handler}
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(optserve.InternalError, match="a fault"):
            connect(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
