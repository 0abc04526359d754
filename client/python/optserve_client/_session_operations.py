"""The operations of one session, without I/O: what both faces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, Unpack

from numpy.typing import ArrayLike

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionStatus
from optserve.v1.tensor_pb2 import TensorHeader
from optserve.wire import Buffer
from optserve_client import _exchange as exchanges
from optserve_client._effects import Collect, Operation, ask
from optserve_client._feed import Feed
from optserve_client._outages import may_pass
from optserve_client._pending import PendingStep
from optserve_client._spec import UpdateOptions, Via, update_request
from optserve_client._steps import StepWays, Taking, is_given_up, steps_lost, total_bytes
from optserve_client._terms import Terms
from optserve_client.errors import (
    ClosedError,
    OptserveError,
    ParametersNotSetError,
    ProtocolError,
    ServiceError,
    SessionNotFoundError,
    StalledError,
    StepOutOfOrderError,
    StepUnknownError,
    UnknownNameError,
    WorkerBusyError,
)
from optserve_client.results import (
    Contribution,
    Parameters,
    StepResult,
    contribution,
    step_result,
)
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
        self.epochs = session.status.epochs
        self.terms = terms
        self._via = via
        self._headers = {header.name: header for header in session.spec.parameters}
        self._values: dict[str, Array] = {}
        self._ways = StepWays(session, terms=terms, worker=worker)

    @property
    def steps(self) -> int:
        """How many steps are known here to have been applied."""
        return self._ways.steps

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
        attempt = partial(self._upload, begin, tensors)
        response = yield from self.terms.outages.persist(attempt)
        self.keep(headers, tensors)
        return response.status

    def download(self, names: Sequence[str] | None = None) -> Operation[Parameters]:
        """Fetch values as they are between two steps; all of them become what is known here."""
        wanted = list(self._headers) if names is None else names
        headers = [self._header_of(name, f"names[{at}]") for at, name in enumerate(wanted)]
        if not headers:  # On the wire, no names would mean all of them.
            return Parameters({}, steps=(yield from self.status()).steps)
        request = pb.DownloadParametersRequest(session_id=self.session_id, names=names or ())
        attempt = partial(self._download, request, headers)
        arrays, steps = yield from self.terms.outages.persist(attempt)
        values = dict(zip(wanted, arrays, strict=True))
        if names is None:
            self._values, self._ways.steps = values, steps
        return Parameters(values, steps=steps)

    def open(self) -> Operation[SessionStatus]:
        """Open the worker's stream, if it is not open, and learn where the session stands."""
        opened = yield from self.terms.outages.persist(self._ways.open)
        return opened.status if opened else (yield from self.status())

    def gradient_buffers(self) -> Operation[dict[str, Array]]:
        """Return the arrays that gradients are best written to."""
        if self._via == "stream":
            yield from self.terms.outages.persist(self._ways.open)
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
        pending = PendingStep(
            number=self.steps + 1 if step is None else step,
            headers=[header for header, _ in present],
            tensors=tensors,
        )
        take = self._ways.unary if (via or self._via) == "unary" else self._ways.streamed
        return (yield from self._answered(pending, lambda: take(pending)))

    def step_from(self, feed: Feed) -> Operation[StepResult]:
        """Take the next step with gradients that are still being computed.

        For the blocking face: it waits for the feed, and closes it. If somebody else does so before
        the step may be ended, the step is given up, and what is raised says nothing.
        """
        headers = [self._headers[name] for name in feed.names]
        pending = PendingStep(number=self.steps + 1, headers=headers)

        def take() -> Taking:
            if not feed.is_ended:
                return self._ways.fed(pending, feed)
            pending.tensors = feed.all()
            return self._ways.streamed(pending)

        try:
            return (yield from self._answered(pending, take, feed.settle))
        finally:
            feed.close()

    def gradient_bytes(self, name: str, gradient: ArrayLike, at: int) -> memoryview:
        """Return the bytes of a parameter's gradient, the one at position ``at`` of a step.

        Raises:
            RequestError: It does not fit the parameter.
        """
        return self._ways.bytes_of(self._headers[name], gradient, at)

    def resume(self) -> Operation[Parameters]:
        """Go on from where the session stands: count its steps, and fetch its parameters."""
        if self._via == "stream":  # Once it is open, nothing more comes of an older one.
            yield from self.terms.outages.persist(self._ways.enter)
        found = yield from self.contribution()
        self._ways.forget()
        self._ways.steps, self.epochs = found.steps, found.epochs
        if found.step > found.steps and found.digest:  # It waits for the other workers: so do we.
            pending = PendingStep(
                number=found.step,
                headers=list(self._headers.values()),
                digest=found.digest,
                has_arrived=True,
            )
            take = self._ways.unary if self._via == "unary" else self._ways.awaited
            try:
                yield from self._answered(pending, lambda: take(pending))
            except ProtocolError as error:
                if not is_given_up(error):
                    raise
            else:
                return self.parameters
        return (yield from self.download())

    def contribution(self) -> Operation[Contribution]:
        """Ask what became of the last step that this worker has sent."""
        request = pb.GetContributionRequest(session_id=self.session_id, worker=self.worker)
        return contribution(
            (yield from self.terms.ask("GetContribution", request, pb.GetContributionResponse))
        )

    def _answered(
        self,
        step: PendingStep,
        take: Callable[[], Taking],
        goes_on: Callable[[], bool] = lambda: True,
    ) -> Operation[StepResult]:
        """Take a step until it is answered, and remember what it brought.

        Args:
            step: What is known of it.
            take: Takes it, in whichever way. Called for each attempt.
            goes_on: Whether there may be another one.
        """

        def again(error: OptserveError) -> bool:
            # Of a call that was cut off, the server may not have noticed that nobody is there.
            cut_off = step.is_unknown and isinstance(error, WorkerBusyError)
            return (may_pass(error) or cut_off) and goes_on()

        try:
            result, arrays = yield from self.terms.outages.persist(
                take, again, lambda: step.reached_s
            )
        except StepOutOfOrderError as error:
            if error.expected.isdecimal() and int(error.expected) <= self.steps:
                raise steps_lost(self.steps, int(error.expected) - 1) from error
            raise
        except (ServiceError, StalledError, WorkerBusyError) as error:
            if step.is_unknown and not isinstance(error, ClosedError):
                raise _unknown(step, error) from error
            raise
        self._values = dict(zip(self._headers, arrays, strict=True))
        self._ways.steps, self.epochs = result.step, result.epochs
        return step_result(result)

    def end_epoch(self, epoch: int | None) -> Operation[SessionStatus]:
        """End an epoch: the next one that is known here, if no number is given."""
        number = self.epochs + 1 if epoch is None else epoch
        request = pb.EndEpochRequest(session_id=self.session_id, epoch=number)
        response = yield from self.terms.ask("EndEpoch", request, pb.EndEpochResponse)
        self.epochs = response.status.epochs
        return response.status

    def status(self) -> Operation[SessionStatus]:
        """Ask where the session stands; what is known here stays as it is."""
        request = pb.GetSessionRequest(session_id=self.session_id)
        response = yield from self.terms.ask("GetSession", request, pb.GetSessionResponse)
        return response.session.status

    def update(self, **options: Unpack[UpdateOptions]) -> Operation[Session]:
        """Change the running session."""
        request = update_request(self.session_id, **options)
        response = yield from self.terms.ask("UpdateSession", request, pb.UpdateSessionResponse)
        self.spec = response.session.spec
        return response.session

    def delete(self, *, persist: bool = True) -> Operation[SessionStatus]:
        """Make the server forget the session; unless it must not take long, until it has."""
        return (yield from delete_session(self.terms, self.session_id, persist=persist))

    def _upload(
        self, begin: pb.UploadBegin, tensors: Sequence[memoryview]
    ) -> Operation[pb.UploadParametersResponse]:
        with self.terms.reporter.transfer("upload", total_bytes(begin.parameters)) as advance:
            sources = [Buffer(tensor) for tensor in tensors]
            requests = exchanges.upload_requests(
                begin, sources, chunk_bytes=self.terms.chunk_bytes, advance=advance
            )
            timeout_s = self.terms.config.transfer_timeout_s
            return (
                yield from ask("UploadParameters", requests, pb.UploadParametersResponse, timeout_s)
            )

    def _download(
        self, request: pb.DownloadParametersRequest, headers: Sequence[TensorHeader]
    ) -> Operation[tuple[list[Array], int]]:
        with self.terms.reporter.transfer("download", total_bytes(headers)) as advance:
            download = exchanges.Download(headers, advance)
            yield Collect(
                rpc="DownloadParameters",
                request=request,
                receive=download.receive,
                timeout_s=self.terms.config.transfer_timeout_s,
            )
        return download.finish(), download.steps

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


def delete_session(
    terms: Terms, session_id: str, *, persist: bool = True
) -> Operation[SessionStatus]:
    """Make the server forget a session; it has done so also if only its answer was lost.

    Args:
        terms: Of the client.
        session_id: Of the session.
        persist: Whether to try again when nothing answers.
    """
    request = pb.DeleteSessionRequest(session_id=session_id)

    def delete() -> Operation[pb.DeleteSessionResponse]:
        return ask("DeleteSession", request, pb.DeleteSessionResponse, terms.config.timeout_s)

    if not persist:
        return (yield from delete()).status
    gone = pb.DeleteSessionResponse(status=SessionStatus(session_id=session_id))
    response = yield from terms.outages.persist_until_gone(delete, SessionNotFoundError, gone)
    return response.status


def _unknown(step: PendingStep, error: OptserveError) -> StepUnknownError:
    return StepUnknownError(
        f"step {step.number} was sent, and no answer came: {error}; whether it was applied is"
        " unknown until asked: see contribution(), or take the same step again, which applies it"
        " once",
        step=step.number,
        digest=step.digest,
        code=error.code,
    )
