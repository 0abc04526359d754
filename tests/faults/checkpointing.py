"""Sessions that are saved, and the calls about that."""

from __future__ import annotations

import torch
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.durable import JOURNAL, durable_spec, stepped
from paging import pages
from refusals import translated
from scenarios.models import model

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.session_pb2 import Durability, Session

STEPS = 3
"""How many a session has taken that is saved."""


class Checkpoints:
    """Calls a server about them."""

    def __init__(self, driver: StubDriver) -> None:
        self.stub = driver.stub

    def save(self, session_id: str, name: str = "best") -> Checkpoint:
        request = pb.SaveCheckpointRequest(session_id=session_id, name=name)
        with translated():
            return self.stub.SaveCheckpoint(request, timeout=TIMEOUT_S).checkpoint

    def page(
        self, session_id: str = "", page_size: int = 0, page_token: str = ""
    ) -> pb.ListCheckpointsResponse:
        request = pb.ListCheckpointsRequest(
            session_id=session_id, page_size=page_size, page_token=page_token
        )
        with translated():
            return self.stub.ListCheckpoints(request, timeout=TIMEOUT_S)

    def names(self, session_id: str = "") -> list[str]:
        return [each.name for each in self.page(session_id).checkpoints]

    def pages(self, page_size: int) -> list[list[str]]:
        """Return the names of all, by page."""
        found = pages(lambda token: self.page(page_size=page_size, page_token=token))
        return [[each.name for each in page.checkpoints] for page in found]

    def restore(self, session_id: str, name: str = "best", **asked: str) -> Session:
        request = pb.RestoreCheckpointRequest(session_id=session_id, name=name, **asked)
        with translated():
            return self.stub.RestoreCheckpoint(request, timeout=TIMEOUT_S).session

    def download(self, session_id: str, name: str = "best") -> tuple[pb.CheckpointBegin, bytes]:
        request = pb.DownloadCheckpointRequest(session_id=session_id, name=name)
        with translated():
            first, *rest = self.stub.DownloadCheckpoint(request, timeout=TIMEOUT_S)
        return first.begin, b"".join(each.data for each in rest)

    def delete(self, session_id: str, name: str = "best") -> Checkpoint:
        request = pb.DeleteCheckpointRequest(session_id=session_id, name=name)
        with translated():
            return self.stub.DeleteCheckpoint(request, timeout=TIMEOUT_S).checkpoint


def trained(driver: StubDriver, durability: Durability = JOURNAL) -> str:
    """Create a session that has one of everything, and has stepped."""
    session_id = driver.create(durable_spec(durability), model()).status.session_id
    stepped(driver, session_id, 1, STEPS)
    driver.end_epoch(session_id, 1)
    driver.evaluate(session_id, torch.eye(4), torch.arange(4))
    return session_id
