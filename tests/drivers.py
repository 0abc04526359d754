"""What a client can do, so that one scenario can be told to the core, to gRPC, to a real process.

``drivers_core.CoreDriver`` reaches the core in this process without gRPC;
``drivers_grpc.StubDriver`` reaches any server by its address.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from event_loop import TIMEOUT_S
from refusals import RefusedError
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionSpec, SessionStatus, Split

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAnswer:
    """What came back from a step."""

    result: pb.StepResult
    parameters: dict[str, Tensor]

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates that the step used, by group."""
        return {rate.group: rate.lr for rate in self.result.rates}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came back from an evaluation."""

    result: pb.LossResult
    gradient: Tensor | None
    elements: Tensor | None


class Worker(Protocol):
    """An open stream of one worker."""

    @property
    def status(self) -> SessionStatus:
        """Where the session stood when the stream was opened."""

    @property
    def contribution(self) -> pb.Contribution | None:
        """The last step that the worker had contributed to then; None if there was none."""

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        """Send a step; the future ends with its answer, or with RefusedError.

        What ``digest`` identifies is the caller's to say.
        """

    def abandon(self) -> None:
        """Break the stream off, whatever goes on."""


class Driver(Protocol):
    """What a client can do. Everything that is refused raises RefusedError."""

    def create(
        self, spec: SessionSpec, values: Tensors | None = None, request_id: str = ""
    ) -> Session:
        """Create a session, with values for its parameters if they are given."""

    def get(self, session_id: str) -> Session:
        """Ask where a session stands, and what is in force."""

    def sessions(self, page_size: int = 0, page_token: str = "") -> pb.ListSessionsResponse:
        """List a page of sessions."""

    def update(self, request: pb.UpdateSessionRequest) -> Session:
        """Change a running session."""

    def delete(self, session_id: str) -> SessionStatus:
        """Delete a session."""

    def upload(self, session_id: str, values: Tensors) -> SessionStatus:
        """Set values of parameters."""

    def download(self, session_id: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """Get values of parameters."""

    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> AbstractContextManager[Worker]:
        """Open a worker's stream, for a block."""

    def contribution(self, session_id: str, worker: int = 0) -> pb.GetContributionResponse:
        """Ask what became of a worker's last step."""

    def end_epoch(self, session_id: str, epoch: int) -> SessionStatus:
        """End an epoch."""

    def evaluate(
        self,
        session_id: str,
        predictions: Tensor,
        targets: Tensor,
        *,
        split: Split.ValueType = Split.SPLIT_UNSPECIFIED,
        gradient: bool = False,
    ) -> Evaluation:
        """Evaluate the session's loss."""

    def loss_points(self, request: pb.ListLossPointsRequest) -> pb.ListLossPointsResponse:
        """Read a page of the history."""


def take(worker: Worker, step: int, gradients: Tensors, digest: bytes = b"") -> StepAnswer:
    """Take one step, and wait for its answer."""
    return worker.start(step, gradients, digest).result(TIMEOUT_S)


def wait_for_contribution(
    driver: Driver, session_id: str, wanted: pb.Contribution, worker: int = 0
) -> None:
    """Wait until the server has taken a worker's contribution."""
    deadline = time.monotonic() + TIMEOUT_S
    while (seen := driver.contribution(session_id, worker).contribution) != wanted:
        assert time.monotonic() < deadline, seen
        time.sleep(0.002)


@contextmanager
def reopened(
    driver: Driver, session_id: str, worker: int = 0, client_id: bytes = b""
) -> Iterator[Worker]:
    """Open a worker's stream once the server has seen that the last one is gone."""
    deadline = time.monotonic() + TIMEOUT_S
    with ExitStack() as stack:
        while True:
            try:
                opened = stack.enter_context(driver.worker(session_id, worker, client_id))
                break
            except RefusedError as error:
                if error.reason != "WORKER_BUSY" or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield opened
