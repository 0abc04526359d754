"""The asyncio face: ``optserve_client`` with the same names, arguments, results and errors.

::

    async with aio.connect("localhost:50051") as client:
        async with client.create_session({"w": w}, optimizer=optim.Adam(lr=1e-3)) as session:
            await session.step({"w": gradient_at(session.parameters["w"])})

``connect``, ``create_session`` and ``join_session`` may be awaited, too, instead of entered.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

import grpc
from numpy.typing import ArrayLike

from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.optimizer_service_pb2 import GetCatalogueResponse, GetServerInfoResponse
from optserve.v1.session_pb2 import Session as SessionMessage
from optserve.v1.session_pb2 import SessionStatus
from optserve_client._asyncio import AsyncDriver
from optserve_client._channel import Line, channel_options, stub_of
from optserve_client._checkpoint_operations import CheckpointOperations
from optserve_client._client_operations import ClientOperations, InitialValues, meet
from optserve_client._credentials import channel_credentials, metadata_of
from optserve_client._effects import Operation
from optserve_client._loss_operations import evaluate_loss, loss_points
from optserve_client._session_operations import Gradients, SessionOperations
from optserve_client._session_view import SessionView
from optserve_client._spec import SessionOptions, UpdateOptions, Via
from optserve_client.config import ClientConfig
from optserve_client.errors import OptserveError, SessionNotFoundError
from optserve_client.progress import ProgressCallback, TransferReporter
from optserve_client.results import (
    Contribution,
    LossHistory,
    LossResult,
    Parameters,
    Split,
    StepResult,
)
from optserve_client.tensors import Array

if TYPE_CHECKING:  # A name of the stubs only.
    from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceAsyncStub

__all__ = ["Client", "Session", "connect"]

_Opened = TypeVar("_Opened", bound="AbstractAsyncContextManager[Any]")


class _Opening(Generic[_Opened]):
    """What will be a client or a session once it is awaited or entered."""

    def __init__(self, coroutine: Coroutine[Any, Any, _Opened]) -> None:
        self._coroutine = coroutine
        self._opened: _Opened | None = None

    def __await__(self) -> Generator[Any, Any, _Opened]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> _Opened:
        self._opened = await self._coroutine
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, traceback)


def connect(
    target: str,
    *,
    config: ClientConfig | None = None,
    progress: bool | ProgressCallback = True,
) -> _Opening[Client]:
    """Connect to a server, as ``optserve_client.connect``."""
    return _Opening(_connect(target, config or ClientConfig(), TransferReporter(progress)))


async def _connect(target: str, config: ClientConfig, reporter: TransferReporter) -> Client:
    metadata, channel = metadata_of(target, config), _channel(target, config)
    line = Line(stub=stub_of(channel), target=target, metadata=metadata)
    try:
        terms = await AsyncDriver(line).run(meet(target, config, reporter))
    except BaseException:
        await channel.close()
        raise
    return Client(line, channel, ClientOperations(terms))


def _channel(target: str, config: ClientConfig) -> grpc.aio.Channel:
    options = channel_options(config)
    if config.tls is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, channel_credentials(config.tls), options)


class Client:
    """A connection to a server, for one event loop. Made by ``connect``."""

    def __init__(
        self,
        line: Line[OptimizerServiceAsyncStub],
        channel: grpc.aio.Channel,
        operations: ClientOperations,
    ) -> None:
        """Call through ``line``, on ``channel``, which is closed with the client."""
        self._line = line
        self._channel = channel
        self._driver = AsyncDriver(line)
        self._operations = operations
        self._session_drivers: weakref.WeakSet[AsyncDriver] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Client of {self._line.target}{', closed' if self._driver.closed else ''}>"

    def create_session(
        self, parameters: InitialValues, **options: Unpack[SessionOptions]
    ) -> _Opening[Session]:
        """Create a session, and take part in it, as ``optserve_client.Client.create_session``."""
        operation = self._operations.create_session(parameters, **options)
        return _Opening(self._open_session(operation, created=True))

    def join_session(
        self, session_id: str, *, worker: int = 0, via: Via = "stream", download: bool = True
    ) -> _Opening[Session]:
        """Take part in a session that exists, as ``optserve_client.Client.join_session``."""
        operation = self._operations.join_session(
            session_id, worker=worker, via=via, download=download
        )
        return _Opening(self._open_session(operation, created=False))

    async def get_session(self, session_id: str) -> SessionMessage:
        """Ask where a session stands, and what is in force for it."""
        return await self._driver.run(self._operations.get_session(session_id))

    async def list_sessions(self, *, page_size: int = 0) -> AsyncIterator[SessionStatus]:
        """Iterate over all sessions, the oldest first, asking for pages on the way."""
        token = ""
        while True:
            page = await self._driver.run(self._operations.session_page(page_size, token))
            for status in page.sessions:
                yield status
            token = page.next_page_token
            if not token:
                return

    async def delete_session(self, session_id: str) -> SessionStatus:
        """Make the server forget a session, and return where it stood."""
        return await self._driver.run(self._operations.delete_session(session_id))

    async def checkpoints(
        self, session_id: str | None = None, *, page_size: int = 0
    ) -> AsyncIterator[Checkpoint]:
        """Iterate over all checkpoints, or those of one session, the oldest first."""
        token = ""
        while True:
            operations = self._operations.checkpoints
            page = await self._driver.run(operations.page(session_id, page_size, token))
            for checkpoint in page.checkpoints:
                yield checkpoint
            token = page.next_page_token
            if not token:
                return

    def restore_checkpoint(
        self,
        session_id: str,
        name: str,
        *,
        display_name: str | None = None,
        worker: int = 0,
        via: Via = "stream",
        download: bool = True,
    ) -> _Opening[Session]:
        """Make a new session of a checkpoint, as ``optserve_client.Client.restore_checkpoint``."""
        operation = self._operations.checkpoints.restore(
            *(session_id, name),
            display_name=display_name,
            worker=worker,
            via=via,
            download=download,
        )
        return _Opening(self._open_session(operation, created=True))

    async def download_checkpoint(
        self, session_id: str, name: str, path: str | os.PathLike[str]
    ) -> Checkpoint:
        """Write a checkpoint to a file, as ``optserve_client.Client.download_checkpoint``."""
        operation = self._operations.checkpoints.download(session_id, name, path)
        return await self._driver.run(operation)

    async def delete_checkpoint(self, session_id: str, name: str) -> Checkpoint:
        """Delete a checkpoint, and return what it was."""
        return await self._driver.run(self._operations.checkpoints.delete(session_id, name))

    async def catalogue(self) -> GetCatalogueResponse:
        """Ask for every optimizer, scheduler and loss, with their hyperparameters."""
        return await self._driver.run(self._operations.catalogue())

    async def server_info(self) -> GetServerInfoResponse:
        """Ask for the server's version, device and limits."""
        return await self._driver.run(self._operations.server_info())

    async def close(self) -> None:
        """End all streams, and disconnect; sessions live on. May be called again."""
        for driver in [*self._session_drivers, self._driver]:
            await driver.close()
        await self._channel.close()

    async def _open_session(
        self, operation: Operation[SessionOperations], *, created: bool
    ) -> Session:
        operations = await self._driver.run(operation)
        driver = AsyncDriver(self._line)
        self._session_drivers.add(driver)
        return Session(operations, driver, created=created)


class Session(SessionView):
    """One session, as ``optserve_client.Session``; for one task at a time."""

    def __init__(
        self, operations: SessionOperations, driver: AsyncDriver, *, created: bool
    ) -> None:
        """Take part through ``operations``; if it was ``created`` here, its block deletes it."""
        super().__init__(operations)
        self._driver = driver
        self._created = created

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._created or self._driver.closed:
            await self.close()
            return
        # What went wrong first is what the caller has to see; and what is gone need not be deleted.
        with suppress(SessionNotFoundError if kind is None else OptserveError):
            await self._delete(persist=kind is None)

    async def open(self) -> SessionStatus:
        """Open this worker's stream now, not with its first step."""
        return await self._driver.run(self._operations.open())

    async def step(
        self, gradients: Gradients, *, step: int | None = None, via: Via | None = None
    ) -> StepResult:
        """Apply one optimizer step, as ``optserve_client.Session.step``."""
        return await self._driver.run(self._operations.step(gradients, step=step, via=via))

    async def contribution(self) -> Contribution:
        """Ask what became of the last step that this worker has sent."""
        return await self._driver.run(self._operations.contribution())

    async def resume(self) -> Parameters:
        """Go on from where the session stands, as ``optserve_client.Session.resume``."""
        return await self._driver.run(self._operations.resume())

    async def gradient_buffers(self) -> dict[str, Array]:
        """Return arrays for gradients, as ``optserve_client.Session.gradient_buffers``."""
        return await self._driver.run(self._operations.gradient_buffers())

    async def end_epoch(self, *, epoch: int | None = None) -> SessionStatus:
        """End an epoch, as ``optserve_client.Session.end_epoch``."""
        return await self._driver.run(self._operations.end_epoch(epoch))

    async def evaluate_loss(
        self,
        predictions: ArrayLike,
        targets: ArrayLike,
        *,
        split: Split | None = None,
        gradient: bool | None = None,
        via: Via | None = None,
    ) -> LossResult:
        """Evaluate the session's loss, as ``optserve_client.Session.evaluate_loss``."""
        return await self._driver.run(
            evaluate_loss(
                self._operations, predictions, targets, split=split, gradient=gradient, via=via
            )
        )

    async def loss_points(self, split: Split | None = None, *, page_size: int = 0) -> LossHistory:
        """Read all the evaluations that the session keeps, the oldest first."""
        return await self._driver.run(loss_points(self._operations, split, page_size))

    async def status(self) -> SessionStatus:
        """Ask where the session stands."""
        return await self._driver.run(self._operations.status())

    async def update(self, **changes: Unpack[UpdateOptions]) -> SessionMessage:
        """Change the running session, as ``optserve_client.Session.update``."""
        return await self._driver.run(self._operations.update(**changes))

    async def upload(self, values: Mapping[str, ArrayLike]) -> SessionStatus:
        """Set values of parameters: all of these, or none."""
        return await self._driver.run(self._operations.upload(values))

    async def download(self, names: Sequence[str] | None = None) -> Parameters:
        """Fetch values of parameters, as ``optserve_client.Session.download``."""
        return await self._driver.run(self._operations.download(names))

    async def save_checkpoint(self, name: str) -> Checkpoint:
        """Save the session under a name, as ``optserve_client.Session.save_checkpoint``."""
        operations = CheckpointOperations(self._operations.terms)
        return await self._driver.run(operations.save(self._operations.session_id, name))

    async def delete(self) -> SessionStatus:
        """Make the server forget the session, as ``optserve_client.Session.delete``."""
        return await self._delete(persist=True)

    async def close(self) -> None:
        """End this worker's stream. The session lives on. May be called again."""
        await self._driver.close()

    async def _delete(self, *, persist: bool) -> SessionStatus:
        await self._driver.end_stream()
        try:
            return await self._driver.run(self._operations.delete(persist=persist))
        finally:
            await self.close()
