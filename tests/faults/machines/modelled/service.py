"""The server that must be like the model: two tenants, a disk, and ends that come at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import grpc
from certificates import token_file
from faults.disks import MemoryDisk
from faults.durable import durable_server
from faults.machines.modelled.session import Contribution, Point, View
from faults.machines.modelled.world import LIMITS
from faults.strangers import ChannelDriver
from messages import bytes_of
from paging import point_pages
from refusals import refused

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionState, SessionStatus, Split
from optserve_server.rpc.access import Access
from optserve_server.rpc.tokens import Tokens

TENANTS = ("alice", "bob")


class Service:
    """One server after the other, over one disk."""

    def __init__(self, calls: Counter[str]) -> None:
        """Start the first one.

        Args:
            calls: Counts the calls of owners, by their methods.
        """
        self._calls = calls
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(TemporaryDirectory()))
        tokens = [(tenant, _token(tenant)) for tenant in TENANTS]
        self._access = Access(tokens=Tokens(token_file(folder / "tokens.toml", tokens)))
        self._serving = ExitStack()
        self._start(MemoryDisk())

    def stop(self) -> None:
        """Stop as SIGTERM does, and start again."""
        disk = self._server.disk
        self._serving.close()
        self._start(disk)

    def kill(self) -> None:
        """Stop as kill -9 does, and start again."""
        disk = self._server.killed()
        self._serving.close()
        self._start(disk)

    def park(self) -> list[str]:
        """Park whatever nobody uses; return the ids."""
        return self._server.loop.run(self._server.registry.park_idle(0.0))

    @property
    def reserved_bytes(self) -> int:
        """How much memory is reserved."""
        return self._server.registry.budget.reserved_bytes

    def close(self) -> None:
        """End for good."""
        self._serving.close()
        self._stack.close()

    def _start(self, disk: MemoryDisk) -> None:
        serving = durable_server(disk, LIMITS, access=self._access)
        self._server = self._serving.enter_context(serving)
        self.channels: dict[str, grpc.Channel] = {}
        """By tenant; for the calls of strangers."""
        self.drivers: dict[str, ChannelDriver] = {}
        """By tenant; for its own calls, which are counted."""
        for tenant in TENANTS:
            plain = self._serving.enter_context(grpc.insecure_channel(self._server.address))
            self.channels[tenant] = grpc.intercept_channel(plain, _Caller(tenant, Counter()))
            own = grpc.intercept_channel(plain, _Caller(tenant, self._calls))
            self.drivers[tenant] = ChannelDriver(own)


class _Details(NamedTuple):
    """See grpc.ClientCallDetails."""

    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Caller(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows a tenant's token with each call, and counts them."""

    def __init__(self, tenant: str, calls: Counter[str]) -> None:
        self._metadata = (("authorization", f"Bearer {_token(tenant)}"),)
        self._calls = calls

    def _pass(
        self, call: Callable[[_Details, object], object], details: _Details, request: object
    ) -> object:
        self._calls[details.method.rpartition("/")[2]] += 1
        shown = _Details(
            method=details.method,
            timeout=details.timeout,
            metadata=self._metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )
        return call(shown, request)

    # To each of them a call is what the next one makes of it.
    intercept_unary_unary = _pass  # type: ignore[assignment]
    intercept_unary_stream = _pass  # type: ignore[assignment]
    intercept_stream_unary = _pass  # type: ignore[assignment]
    intercept_stream_stream = _pass  # type: ignore[assignment]


def look(driver: ChannelDriver, session_id: str) -> View:
    """Look at all of a session, in pages of one point."""
    session = driver.get(session_id)
    ready = session.status.state == SessionState.SESSION_STATE_READY
    if not ready:
        with refused("PARAMETERS_NOT_SET"):
            driver.download(session_id)
    parameters = driver.download(session_id) if ready else {}
    kept, forgotten = points(driver, session_id)
    in_force = session.spec
    return View(
        state=session.status.state,
        steps=session.status.steps,
        epochs=session.status.epochs,
        rates=rates_of(session.status),
        display_name=session.status.display_name,
        momenta=_momenta(session),
        loss=in_force.loss.WhichOneof("kind") if in_force.HasField("loss") else None,
        non_finite=in_force.non_finite,
        parameters={name: bytes_of(each) for name, each in parameters.items()} if ready else None,
        points=kept,
        forgotten=forgotten,
        contributions=[
            contribution_of(driver.contribution(session_id, worker))
            for worker in range(session.status.workers)
        ],
    )


def rates_of(message: SessionStatus | pb.StepResult) -> dict[str, float]:
    """Return the learning rates that a message tells of, by group."""
    return {rate.group: rate.lr for rate in message.rates}


def contribution_of(
    message: pb.GetContributionResponse | pb.TrainOpened,
) -> Contribution | None:
    """Return the contribution that a message tells of."""
    if not message.HasField("contribution"):
        return None
    told = message.contribution
    return Contribution(step=told.step, digest=told.digest, applied=told.applied)


def points(
    driver: ChannelDriver, session_id: str, split: Split.ValueType = Split.SPLIT_UNSPECIFIED
) -> tuple[list[Point], int]:
    """Return what is kept of a history, read in pages of one point, and how much is forgotten."""
    found: list[Point] = []
    request = pb.ListLossPointsRequest(session_id=session_id, split=split, page_size=1)
    for page in point_pages(driver, request):
        found += [
            Point(
                sequence=each.sequence,
                split=each.split,
                steps=each.steps,
                epochs=each.epochs,
                loss=each.loss,
            )
            for each in page.points
        ]
    return found, page.forgotten


def _momenta(session: Session) -> dict[str, float]:
    """Return the momenta in force, by group; of an optimizer that has none, zeros."""
    return {group.name: group.overrides.sgd.momentum for group in session.spec.groups}


def _token(tenant: str) -> str:
    return f"token of {tenant}".replace(" ", "-")
