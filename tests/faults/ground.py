"""Where mistakes are made: a server, a session that stands somewhere, and a look at all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest
import torch
from drivers import take
from drivers_core import registry_on
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S, EventLoopThread
from messages import bytes_of
from refusals import RefusedError
from scenarios.models import B_GROUP, gradients, model, spec

from optserve.reasons import reason_name
from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import Adam
from optserve.v1.optimizer_service_pb2 import ListLossPointsRequest
from optserve.v1.scheduler_pb2 import StepLR
from optserve.v1.session_pb2 import LossPoint, Session, SessionSpec, SessionStatus, Split
from optserve_server.core.limits import Limits
from optserve_server.core.registry import SessionRegistry
from optserve_server.rpc.server import Server
from optserve_server.rpc.status import STATUS

CODES = {reason_name(reason): code for code, reason in STATUS.values()}

OF_CHECKPOINTS = frozenset(
    {"ListCheckpoints", "RestoreCheckpoint", "DownloadCheckpoint", "DeleteCheckpoint"}
)
"""Calls that name a session, which may be gone: see test_bad_checkpoints.py."""

CLASSES = 4
STEPS, EPOCHS = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that a refusal must leave as it was."""

    sessions: list[SessionStatus]
    session: Session
    parameters: dict[str, bytes]
    points: list[LossPoint]
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A server in this process, and a session of it that has stepped."""

    driver: StubDriver
    channel: grpc.Channel
    registry: SessionRegistry
    session_id: str

    def look(self) -> Scene:
        """Look at everything."""
        history = self.driver.loss_points(ListLossPointsRequest(session_id=self.session_id))
        parameters = self.driver.download(self.session_id)
        return Scene(
            sessions=list(self.driver.sessions().sessions),
            session=self.driver.get(self.session_id),
            parameters={name: bytes_of(value) for name, value in parameters.items()},
            points=list(history.points),
            reserved_bytes=self.registry.budget.reserved_bytes,
        )

    def look_until(self, wanted: Scene) -> Scene:
        """Look until it is as wanted, or for long: the server sees a broken call a bit later."""
        deadline = time.monotonic() + TIMEOUT_S / 10
        while (seen := self.look()) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        return seen


class Mistakes:
    """Makes sure that what is refused was refused rightly, and changed nothing."""

    def __init__(self, where: Ground) -> None:
        self.ground = where

    @contextmanager
    def refused(self, reason: str, field: str) -> Iterator[None]:
        """Make sure that the block is refused, and that afterwards all is as before."""
        before = self.ground.look()
        with pytest.raises(RefusedError) as caught:
            yield
        error = caught.value
        assert (error.reason, error.field) == (reason, field), error
        assert error.code is CODES[reason]
        assert error.message
        assert self.ground.look() == before


def rich_spec() -> SessionSpec:
    """Return a spec that has one of everything."""
    return spec(
        Adam(lr=0.1), groups=[B_GROUP], scheduler=StepLR(step_size=3), loss=CrossEntropyLoss()
    )


@contextmanager
def ground(limits: Limits | None = None) -> Iterator[Ground]:
    """Serve a session that has stepped, ended an epoch and evaluated its loss."""
    with EventLoopThread() as loop, registry_on(loop, limits or Limits()) as registry:
        server = loop.call(lambda: Server(registry))
        address = loop.run(server.start("127.0.0.1", 0))
        with StubDriver(address) as driver, grpc.insecure_channel(address) as channel:
            session_id = driver.create(rich_spec(), model()).status.session_id
            with driver.worker(session_id) as worker:
                for step in range(1, STEPS + 1):
                    take(worker, step, gradients(step))
            driver.end_epoch(session_id, EPOCHS)
            logits, classes = torch.eye(CLASSES), torch.arange(CLASSES)
            driver.evaluate(session_id, logits, classes, split=Split.SPLIT_TRAIN)
            yield Ground(driver=driver, channel=channel, registry=registry, session_id=session_id)
        loop.run(server.stop(0))
