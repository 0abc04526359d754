"""The operations of a client, without I/O: what both faces share."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, Unpack

import numpy as np
from numpy.typing import ArrayLike

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionStatus
from optserve.v1.tensor_pb2 import TensorHeader
from optserve_client._checkpoint_operations import CheckpointOperations
from optserve_client._effects import Operation, ask
from optserve_client._exchange import INLINE_BYTES_MAX
from optserve_client._outages import Outages
from optserve_client._session_operations import SessionOperations, delete_session
from optserve_client._spec import Placeholder, SpecOptions, Via, session_spec
from optserve_client._steps import check_unary_fits
from optserve_client._terms import Terms
from optserve_client.config import ClientConfig
from optserve_client.errors import DeadlineError, OptserveError, UnavailableError
from optserve_client.progress import TransferReporter
from optserve_client.tensors import announce, encode, messages

InitialValues: TypeAlias = Mapping[str, ArrayLike | Placeholder]
"""By parameter: its value, or what stands for a value that is uploaded later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of sessions."""

    sessions: Sequence[SessionStatus]
    next_page_token: str
    """Empty: this was the last one."""


def meet(target: str, config: ClientConfig, reporter: TransferReporter) -> Operation[Terms]:
    """Ask the server who it is, and return the terms of all further calls.

    Raises:
        UnavailableError: No server answers.
    """
    request, timeout_s = pb.GetServerInfoRequest(), config.connect_timeout_s
    outages = Outages(target, config.retry)
    try:
        info = yield from ask("GetServerInfo", request, pb.GetServerInfoResponse, timeout_s)
    except (UnavailableError, DeadlineError) as error:
        if error.reason:  # It answers, and says itself why it will not serve.
            raise
        silence = f"no optserve server answers at {target} within {timeout_s:g} s"
        problem = silence if isinstance(error, DeadlineError) else str(error)
        message = f"{problem}; start one with `optserve-server`"
        raise UnavailableError(message, code=error.code) from error
    chunk_bytes = min(config.chunk_bytes, info.limits.chunk_bytes_max)
    return Terms(config=config, chunk_bytes=chunk_bytes, reporter=reporter, outages=outages)


class ClientOperations:
    """What a connected client can do."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.checkpoints = CheckpointOperations(terms)

    def create_session(
        self,
        parameters: InitialValues,
        *,
        worker: int = 0,
        via: Via = "stream",
        **spec: Unpack[SpecOptions],
    ) -> Operation[SessionOperations]:
        """Make a session with these values, which travel in the same message if they are few.

        If their upload fails, the session is deleted again.
        """
        headers: list[TensorHeader] = []
        values: dict[str, ArrayLike] = {}
        tensors: list[memoryview] = []
        for at, (name, value) in enumerate(parameters.items()):
            path = f"spec.parameters[{at}]"
            if isinstance(value, Placeholder):
                headers.append(announce(name, np.dtype(value.dtype), value.shape, path=path))
                continue
            header, data = encode(name, value, path=path)
            headers.append(header)
            values[name] = value
            tensors.append(data)
        if via == "unary":
            check_unary_fits(headers)
        valued = [header for header in headers if header.name in values]
        request = pb.CreateSessionRequest(
            spec=session_spec(headers, **spec), request_id=uuid.uuid4().hex
        )
        # Twice: each header stands in the spec, and beside its value.
        inline = 2 * request.ByteSize() + sum(len(data) for data in tensors) <= INLINE_BYTES_MAX
        if inline:
            request.values.extend(messages(valued, tensors))
        response = yield from self._terms.ask("CreateSession", request, pb.CreateSessionResponse)
        session = SessionOperations(response.session, terms=self._terms, worker=worker, via=via)
        if inline:
            session.keep(valued, tensors)
        elif values:
            yield from _upload_or_delete(session, values)
        return session

    def join_session(
        self, session_id: str, *, worker: int, via: Via, download: bool
    ) -> Operation[SessionOperations]:
        """Take part in a session that another client made."""
        found = yield from self.get_session(session_id)
        if via == "unary":
            check_unary_fits(found.spec.parameters)
        session = SessionOperations(found, terms=self._terms, worker=worker, via=via)
        if download:
            yield from session.download()
        return session

    def get_session(self, session_id: str) -> Operation[Session]:
        """Ask for a session in full."""
        request = pb.GetSessionRequest(session_id=session_id)
        response = yield from self._terms.ask("GetSession", request, pb.GetSessionResponse)
        return response.session

    def delete_session(self, session_id: str) -> Operation[SessionStatus]:
        """Make the server forget a session."""
        return (yield from delete_session(self._terms, session_id))

    def session_page(self, page_size: int, page_token: str) -> Operation[Page]:
        """Ask for the page of sessions that the token names; an empty one names the first."""
        request = pb.ListSessionsRequest(page_size=page_size, page_token=page_token)
        response = yield from self._terms.ask("ListSessions", request, pb.ListSessionsResponse)
        return Page(sessions=response.sessions, next_page_token=response.next_page_token)

    def catalogue(self) -> Operation[pb.GetCatalogueResponse]:
        """Ask for everything that can be chosen."""
        request = pb.GetCatalogueRequest()
        return (yield from self._terms.ask("GetCatalogue", request, pb.GetCatalogueResponse))

    def server_info(self) -> Operation[pb.GetServerInfoResponse]:
        """Ask what the server is."""
        request = pb.GetServerInfoRequest()
        return (yield from self._terms.ask("GetServerInfo", request, pb.GetServerInfoResponse))


def _upload_or_delete(
    session: SessionOperations, values: Mapping[str, ArrayLike]
) -> Operation[None]:
    try:
        yield from session.upload(values)
    except GeneratorExit:  # The driver itself is gone: there is nobody left to perform a deletion.
        raise
    except BaseException:
        with suppress(OptserveError):
            yield from session.delete(persist=False)
        raise
