"""The operations of checkpoints, without I/O: what both faces share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve_client._effects import Collect, Operation, ask
from optserve_client._session_operations import SessionOperations
from optserve_client._spec import Via
from optserve_client._steps import check_unary_fits
from optserve_client._terms import Terms
from optserve_client.errors import CheckpointNotFoundError, ProtocolError
from optserve_client.progress import Advance, TransferReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPage:
    """A page of checkpoints."""

    checkpoints: Sequence[Checkpoint]
    next_page_token: str
    """Empty: this was the last one."""


class CheckpointOperations:
    """What a connected client can do with checkpoints."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def save(self, session_id: str, name: str) -> Operation[Checkpoint]:
        """Save a session under a name; saved twice, it is the same checkpoint."""
        request = pb.SaveCheckpointRequest(session_id=session_id, name=name)
        timeout_s = self._terms.config.transfer_timeout_s  # The server's disk takes its time.
        response = yield from self._terms.outages.persist(
            lambda: ask("SaveCheckpoint", request, pb.SaveCheckpointResponse, timeout_s)
        )
        return response.checkpoint

    def page(
        self, session_id: str | None, page_size: int, page_token: str
    ) -> Operation[CheckpointPage]:
        """Ask for the page of checkpoints that the token names; an empty one names the first."""
        request = pb.ListCheckpointsRequest(
            session_id=session_id or "", page_size=page_size, page_token=page_token
        )
        response = yield from self._terms.ask(
            "ListCheckpoints", request, pb.ListCheckpointsResponse
        )
        return CheckpointPage(
            checkpoints=response.checkpoints, next_page_token=response.next_page_token
        )

    def restore(
        self,
        session_id: str,
        name: str,
        *,
        display_name: str | None,
        worker: int,
        via: Via,
        download: bool,
    ) -> Operation[SessionOperations]:
        """Make a session that goes on from a checkpoint, and take part in it."""
        request = pb.RestoreCheckpointRequest(
            session_id=session_id,
            name=name,
            request_id=uuid.uuid4().hex,
            display_name=display_name,
        )
        timeout_s = self._terms.config.transfer_timeout_s
        response = yield from self._terms.outages.persist(
            lambda: ask("RestoreCheckpoint", request, pb.RestoreCheckpointResponse, timeout_s)
        )
        if via == "unary":
            check_unary_fits(response.session.spec.parameters)
        session = SessionOperations(response.session, terms=self._terms, worker=worker, via=via)
        if download:
            yield from session.download()
        return session

    def download(
        self, session_id: str, name: str, path: str | os.PathLike[str]
    ) -> Operation[Checkpoint]:
        """Write a checkpoint to a file: whole, or not at all."""
        request = pb.DownloadCheckpointRequest(session_id=session_id, name=name)
        return (yield from self._terms.outages.persist(lambda: self._download(request, Path(path))))

    def delete(self, session_id: str, name: str) -> Operation[Checkpoint]:
        """Delete a checkpoint; it is deleted also if only the answer to that was lost."""
        request = pb.DeleteCheckpointRequest(session_id=session_id, name=name)
        timeout_s = self._terms.config.timeout_s
        response = yield from self._terms.outages.persist_until_gone(
            lambda: ask("DeleteCheckpoint", request, pb.DeleteCheckpointResponse, timeout_s),
            CheckpointNotFoundError,
            pb.DeleteCheckpointResponse(checkpoint=Checkpoint(session_id=session_id, name=name)),
        )
        return response.checkpoint

    def _download(self, request: pb.DownloadCheckpointRequest, path: Path) -> Operation[Checkpoint]:
        with _written(path) as file, _Download(file, self._terms.reporter) as download:
            yield Collect(
                rpc="DownloadCheckpoint",
                request=request,
                receive=download.receive,
                timeout_s=self._terms.config.transfer_timeout_s,
            )
            return download.finish()


class _Download:
    """A checkpoint that arrives."""

    def __init__(self, file: IO[bytes], reporter: TransferReporter) -> None:
        self._file = file
        self._reporter = reporter
        self._begin: pb.CheckpointBegin | None = None
        self._advance: Advance | None = None
        self._rest = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def receive(self, response: pb.DownloadCheckpointResponse) -> None:
        """Take the next event."""
        if response.HasField("begin"):
            if self._begin is not None:
                raise ProtocolError("the server began a checkpoint twice")
            self._begin, self._rest = response.begin, response.begin.byte_count
            reported = self._reporter.transfer("download", self._rest)
            self._advance = self._stack.enter_context(reported)
            return
        if self._advance is None:
            raise ProtocolError("the server sent data of a checkpoint before it began")
        self._rest -= self._file.write(response.data)
        self._advance(len(response.data))

    def finish(self) -> Checkpoint:
        """Return what has come, all of it."""
        if self._begin is None or self._rest:
            raise ProtocolError(f"the server's checkpoint is incomplete: {self._rest} bytes")
        return self._begin.checkpoint


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """Have a file to write to beside ``path``, which gets that name once the block is done.

    It is not synced: that takes seconds, and the asyncio face has none.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
