"""The operations of one session, without I/O: what both faces share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, Unpack

from numpy.typing import ArrayLike

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionStatus
from optserve.v1.tensor_pb2 import TensorHeader
from optserve.wire import Buffer
from optserve_client import _exchange as exchanges
from optserve_client._effects import Collect, Operation, ask
from optserve_client._feed import Feed
from optserve_client._spec import UpdateOptions, Via, update_request
from optserve_client._steps import StepWays, Taking, total_bytes
from optserve_client._terms import Terms
from optserve_client.errors import (
    DeadlineError,
    ParametersNotSetError,
    UnknownNameError,
)
from optserve_client.results import Parameters, StepResult, step_result
from optserve_client.tensors import Array, allocate, bytes_of, encode_as

Gradients: TypeAlias = Mapping[str, ArrayLike | None]
"""By parameter. None, or nothing, is no gradient, which is not a gradient of zeros."""


class SessionOperations:
    """One session as one of its workers knows it, and what that worker can do.

    What the worker knows changes only when an operation has succeeded.
    """

    def __init__(self, session: Session, *, terms: Terms, worker: int, via: Via) -> None:
        """Take part in ``session`` as ``worker``, whose steps travel ``via`` it."""
        self.session_id = session.status.session_id
        self.spec = session.spec
        self.worker = worker
        self.steps = session.status.steps
        self.epochs = session.status.epochs
        self.terms = terms
        self._via = via
        self._headers = {header.name: header for header in session.spec.parameters}
        self._values: dict[str, Array] = {}
        self._ways = StepWays(session, terms=terms, worker=worker)

    @property
    def names(self) -> list[str]:
        """Of the parameters, in the session's order."""
        return list(self._headers)

    @property
    def overlaps(self) -> bool:
        """Whether it pays to send a step's gradients one by one: they fill several messages."""
        return self._via == "stream" and not self._ways.packs

    @property
    def parameters(self) -> Parameters:
        """The newest values, read-only, in the session's order; valid until the next step.

        Raises:
            ParametersNotSetError: This client does not know all of them.
        """
        if len(self._values) < len(self._headers):
            raise ParametersNotSetError.local(
                "the values of the parameters are not known here: download() or upload() them first"
            )
        return Parameters(self._values, steps=self.steps)

    def keep(self, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]) -> None:
        """Remember copies of values that the server has now."""
        known = dict(self._values)
        for header, data, array in zip(headers, tensors, allocate(headers), strict=True):
            bytes_of(array)[:] = data  # copy: the caller's tensor to ours.
            array.flags.writeable = False
            known[header.name] = array
        self._values = {name: known[name] for name in self._headers if name in known}

    def upload(self, values: Mapping[str, ArrayLike]) -> Operation[SessionStatus]:
        """Set the values of some or all parameters: all of these, or none."""
        headers = [
            self._header_of(name, f"parameters[{at}].name") for at, name in enumerate(values)
        ]
        tensors = [
            encode_as(header, values[header.name], role="value", path=f"parameters[{at}]")
            for at, header in enumerate(headers)
        ]
        begin = pb.UploadBegin(session_id=self.session_id, parameters=headers)
        timeout_s = self.terms.config.transfer_timeout_s
        with self.terms.reporter.transfer("upload", total_bytes(headers)) as advance:
            sources = [Buffer(tensor) for tensor in tensors]
            requests = exchanges.upload_requests(
                begin, sources, chunk_bytes=self.terms.chunk_bytes, advance=advance
            )
            response = yield from ask(
                "UploadParameters", requests, pb.UploadParametersResponse, timeout_s
            )
        self.keep(headers, tensors)
        return response.status

    def download(self, names: Sequence[str] | None = None) -> Operation[Parameters]:
        """Fetch values as they are between two steps; all of them become what is known here."""
        wanted = list(self._headers) if names is None else names
        headers = [self._header_of(name, f"names[{at}]") for at, name in enumerate(wanted)]
        if not headers:  # On the wire, no names would mean all of them.
            return Parameters({}, steps=(yield from self.status()).steps)
        with self.terms.reporter.transfer("download", total_bytes(headers)) as advance:
            download = exchanges.Download(headers, advance)
            yield Collect(
                rpc="DownloadParameters",
                request=pb.DownloadParametersRequest(session_id=self.session_id, names=names or ()),
                receive=download.receive,
                timeout_s=self.terms.config.transfer_timeout_s,
            )
        values = dict(zip(wanted, download.finish(), strict=True))
        if names is None:
            self._values, self.steps = values, download.steps
        return Parameters(values, steps=download.steps)

    def open(self) -> Operation[SessionStatus]:
        """Open the worker's stream, if it is not open, and learn where the session stands."""
        opened = yield from self._ways.open(self.terms.config.timeout_s)
        return opened.status if opened else (yield from self.status())

    def gradient_buffers(self) -> Operation[dict[str, Array]]:
        """Return the arrays that gradients are best written to."""
        if self._via == "stream":
            yield from self._ways.open(self.terms.config.timeout_s)
        return dict(zip(self._headers, self._ways.buffers, strict=True))

    def step(
        self, gradients: Gradients, *, step: int | None, via: Via | None
    ) -> Operation[StepResult]:
        """Take a step with these gradients.

        Unless it is given, its number is the one after the last step that was answered: taken again
        after an error, the step is the same one, and the server applies it once.
        """
        for at, name in enumerate(gradients):
            self._header_of(name, f"gradients[{at}].name")
        present = [
            (header, gradient)
            for name, header in self._headers.items()
            if (gradient := gradients.get(name)) is not None
        ]
        tensors = [
            self._ways.bytes_of(header, gradient, at)
            for at, (header, gradient) in enumerate(present)
        ]
        number = self.steps + 1 if step is None else step
        headers = [header for header, _ in present]
        take = self._ways.unary if (via or self._via) == "unary" else self._ways.streamed
        return (yield from self._numbered(number, take(number, headers, tensors)))

    def step_from(self, feed: Feed) -> Operation[StepResult]:
        """Take the next step with gradients that are still being computed.

        For the blocking face: it waits for the feed, and closes it. If somebody else does so before
        the step may be ended, the step is given up, and what is raised says nothing.
        """
        number = self.steps + 1
        try:
            return (yield from self._numbered(number, self._ways.fed(number, feed)))
        finally:
            feed.close()

    def gradient_bytes(self, name: str, gradient: ArrayLike, at: int) -> memoryview:
        """Return the bytes of a parameter's gradient, the one at position ``at`` of a step.

        Raises:
            RequestError: It does not fit the parameter.
        """
        return self._ways.bytes_of(self._headers[name], gradient, at)

    def _numbered(self, number: int, step: Taking) -> Operation[StepResult]:
        """Take step ``number`` in whichever way, and remember what it brought."""
        try:
            result, arrays = yield from step
        except DeadlineError as error:
            raise DeadlineError(
                f"step {number} did not end within {self.terms.config.step_timeout_s:g} s;"
                " whether it was applied is unknown until asked: see status().steps,"
                " or take the same step again, which applies it once",
                code=error.code,
            ) from error
        self._values = dict(zip(self._headers, arrays, strict=True))
        self.steps, self.epochs = result.step, result.epochs
        return step_result(result)

    def end_epoch(self, epoch: int | None) -> Operation[SessionStatus]:
        """End an epoch: the next one that is known here, if no number is given."""
        number = self.epochs + 1 if epoch is None else epoch
        request = pb.EndEpochRequest(session_id=self.session_id, epoch=number)
        response = yield from ask(
            "EndEpoch", request, pb.EndEpochResponse, self.terms.config.timeout_s
        )
        self.epochs = response.status.epochs
        return response.status

    def status(self) -> Operation[SessionStatus]:
        """Ask where the session stands; what is known here stays as it is."""
        request = pb.GetSessionRequest(session_id=self.session_id)
        timeout_s = self.terms.config.timeout_s
        response = yield from ask("GetSession", request, pb.GetSessionResponse, timeout_s)
        return response.session.status

    def update(self, **options: Unpack[UpdateOptions]) -> Operation[Session]:
        """Change the running session."""
        request = update_request(self.session_id, **options)
        timeout_s = self.terms.config.timeout_s
        response = yield from ask("UpdateSession", request, pb.UpdateSessionResponse, timeout_s)
        self.spec = response.session.spec
        return response.session

    def delete(self) -> Operation[SessionStatus]:
        """Make the server forget the session."""
        request = pb.DeleteSessionRequest(session_id=self.session_id)
        timeout_s = self.terms.config.timeout_s
        response = yield from ask("DeleteSession", request, pb.DeleteSessionResponse, timeout_s)
        return response.status

    def _header_of(self, name: str, field: str) -> TensorHeader:
        if name not in self._headers:
            known = ", ".join(f"'{known}'" for known in list(self._headers)[:20])
            raise UnknownNameError.local(
                f"'{name}' is no parameter of this session, which has {known}",
                field=field,
                expected=known,
                actual=name,
            )
        return self._headers[name]
