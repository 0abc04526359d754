"""A client of the blocking face."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Self, Unpack

import grpc

from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.optimizer_service_pb2 import GetCatalogueResponse, GetServerInfoResponse
from optserve.v1.session_pb2 import Session as SessionMessage
from optserve.v1.session_pb2 import SessionStatus
from optserve_client._blocking import BlockingDriver
from optserve_client._channel import Line, channel_options, stub_of
from optserve_client._client_operations import ClientOperations, InitialValues, meet
from optserve_client._credentials import channel_credentials, metadata_of
from optserve_client._spec import SessionOptions, Via
from optserve_client._watchdog import Watchdog
from optserve_client.config import ClientConfig
from optserve_client.progress import ProgressCallback, TransferReporter
from optserve_client.session import Session


def connect(
    target: str,
    *,
    config: ClientConfig | None = None,
    progress: bool | ProgressCallback = True,
) -> Client:
    """Connect to a server, and return a client that has heard from it.

    Args:
        target: As gRPC names it: "localhost:50051", "unix:/run/optserve.sock".
        config: Deadlines, sizes, patience, identity. None: the defaults.
        progress: What long uploads and downloads of parameters show: a bar (True; see
            ``progress``), nothing (False), or what the callback does with it.

    Raises:
        UnavailableError: No server answers there. That is not tried again: it may be the wrong
            address.
        ValueError: There is a token, and anybody on the way could read it.
        OSError: A certificate, a key or a token cannot be read.
    """
    return Client(target, config or ClientConfig(), TransferReporter(progress))


class Client:
    """A connection to a server. For any number of threads; made by ``connect``.

    As a context manager it is closed at the end of the block.
    """

    def __init__(self, target: str, config: ClientConfig, reporter: TransferReporter) -> None:
        """Connect to ``target``."""
        self._target = target
        self._watchdog = Watchdog()
        metadata, channel = metadata_of(target, config), _channel(target, config)
        self._line = Line(stub=stub_of(channel), target=target, metadata=metadata)
        self._driver = self._new_driver()
        self._session_drivers: weakref.WeakSet[BlockingDriver] = weakref.WeakSet()
        # Also when nobody closes it, at the latest when the interpreter ends.
        self._finalizer = weakref.finalize(self, _disconnect, channel, self._watchdog)
        try:
            terms = self._driver.run(meet(target, config, reporter))
        except BaseException:
            self.close()
            raise
        self._operations = ClientOperations(terms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self._target}{', closed' if self._driver.closed else ''}>"

    def create_session(
        self, parameters: InitialValues, **options: Unpack[SessionOptions]
    ) -> Session:
        """Create a session, and take part in it.

        Args:
            parameters: Initial values, by name; a ``Placeholder`` stands for one that is uploaded
                later. Their order, shapes and data types are the session's from now on.
            options: See ``SessionOptions``; ``optimizer`` is required.

        Returns:
            The session, whose ``spec`` has every hyperparameter that is in force.

        Raises:
            RequestError: Something in it is not allowed. Nothing was created.
            LimitError: It is larger, or there are more sessions, than the server allows. Nothing
                was created.
        """
        operations = self._driver.run(self._operations.create_session(parameters, **options))
        return Session(operations, self._session_driver(), created=True)

    def join_session(
        self, session_id: str, *, worker: int = 0, via: Via = "stream", download: bool = True
    ) -> Session:
        """Take part in a session that exists, as another worker, or to watch and change it.

        Args:
            session_id: Of the session.
            worker: Which of its workers to be, from 0.
            via: How its steps travel.
            download: Whether to fetch the parameters now.

        Raises:
            SessionNotFoundError: There is no such session.
            ParametersNotSetError: Not every parameter has a value yet; join without ``download`` to
                upload them.
        """
        operations = self._driver.run(
            self._operations.join_session(session_id, worker=worker, via=via, download=download)
        )
        return Session(operations, self._session_driver(), created=False)

    def get_session(self, session_id: str) -> SessionMessage:
        """Ask where a session stands, and what is in force for it.

        Raises:
            SessionNotFoundError: There is no such session.
        """
        return self._driver.run(self._operations.get_session(session_id))

    def list_sessions(self, *, page_size: int = 0) -> Iterator[SessionStatus]:
        """Iterate over all sessions, the oldest first, asking for pages on the way."""
        token = ""
        while True:
            page = self._driver.run(self._operations.session_page(page_size, token))
            yield from page.sessions
            token = page.next_page_token
            if not token:
                return

    def delete_session(self, session_id: str) -> SessionStatus:
        """Make the server forget a session, and return where it stood.

        Raises:
            SessionNotFoundError: There is no such session.
        """
        return self._driver.run(self._operations.delete_session(session_id))

    def checkpoints(
        self, session_id: str | None = None, *, page_size: int = 0
    ) -> Iterator[Checkpoint]:
        """Iterate over all checkpoints, or those of one session, the oldest first.

        Raises:
            NoStorageError: The server keeps none.
        """
        token = ""
        while True:
            operations = self._operations.checkpoints
            page = self._driver.run(operations.page(session_id, page_size, token))
            yield from page.checkpoints
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
    ) -> Session:
        """Make a new session that goes on from a checkpoint, and take part in it.

        As a context manager it is deleted at the end of the block, as one that was created.

        Args:
            session_id: Of the session that it was saved of, which stays as it is, or is gone.
            name: Of the checkpoint.
            display_name: Of the new session. None: that of the other one.
            worker: Which of its workers to be, from 0.
            via: How its steps travel.
            download: Whether to fetch the parameters now.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
            SessionDamagedError: What the server has of it is not what it saved.
            LimitError: There is no room for the session.
            ParametersNotSetError: Not every parameter had a value; restore without ``download`` to
                upload them.
        """
        operation = self._operations.checkpoints.restore(
            *(session_id, name),
            display_name=display_name,
            worker=worker,
            via=via,
            download=download,
        )
        return Session(self._driver.run(operation), self._session_driver(), created=True)

    def download_checkpoint(
        self, session_id: str, name: str, path: str | os.PathLike[str]
    ) -> Checkpoint:
        """Write a checkpoint to a file of the safetensors format: whole, or not at all.

        Its tensors are "parameters/<name>", and "optimizer/<name>/<torch's name>" for what the
        optimizer keeps of a parameter; its metadata has the session's spec as JSON.

        Args:
            session_id: Of the session that it was saved of.
            name: Of the checkpoint.
            path: Of the file. What has the name already is replaced.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
            OSError: The file cannot be written.
        """
        return self._driver.run(self._operations.checkpoints.download(session_id, name, path))

    def delete_checkpoint(self, session_id: str, name: str) -> Checkpoint:
        """Delete a checkpoint, and return what it was.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
        """
        return self._driver.run(self._operations.checkpoints.delete(session_id, name))

    def catalogue(self) -> GetCatalogueResponse:
        """Ask for every optimizer, scheduler and loss, with their hyperparameters."""
        return self._driver.run(self._operations.catalogue())

    def server_info(self) -> GetServerInfoResponse:
        """Ask for the server's version, device and limits."""
        return self._driver.run(self._operations.server_info())

    def close(self) -> None:
        """End all streams, and disconnect; sessions live on. May be called again."""
        for driver in [*self._session_drivers, self._driver]:
            driver.close()
        self._finalizer()

    def _new_driver(self) -> BlockingDriver:
        return BlockingDriver(self._line, self._watchdog)

    def _session_driver(self) -> BlockingDriver:
        driver = self._new_driver()
        self._session_drivers.add(driver)
        return driver


def _channel(target: str, config: ClientConfig) -> grpc.Channel:
    options = channel_options(config)
    if config.tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, channel_credentials(config.tls), options)


def _disconnect(channel: grpc.Channel, watchdog: Watchdog) -> None:
    channel.close()
    watchdog.close()
