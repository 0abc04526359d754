"""A server whose sessions have a journal: what a client can do with one is what it can do with any.

Now and then, before a call, all sessions are parked: they come back, and nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from drivers import Tensors
from drivers_grpc import StubDriver
from faults.durable import JOURNAL, DurableServer, durable_server

from optserve.v1.session_pb2 import Session, SessionSpec


class DurableDriver(StubDriver):
    """Asks for a journal in every session, and has idle ones parked before it looks at them."""

    def __init__(self, server: DurableServer) -> None:
        super().__init__(server.address)
        self._server = server

    def create(
        self, spec: SessionSpec, values: Tensors | None = None, request_id: str = ""
    ) -> Session:
        wanted = SessionSpec()
        wanted.CopyFrom(spec)
        wanted.durability.CopyFrom(JOURNAL)
        return super().create(wanted, values, request_id)

    def get(self, session_id: str) -> Session:
        self._server.loop.run(self._server.registry.park_idle(0.0))
        return super().get(session_id)


@contextmanager
def durable_drivers() -> Iterator[DurableDriver]:
    """Drive a server over a disk in memory."""
    with durable_server() as server, DurableDriver(server) as driver:
        yield driver
