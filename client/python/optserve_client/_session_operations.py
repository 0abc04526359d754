"""The operations of one session, without I/O: what both faces share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, Unpack

import numpy as np
from numpy.typing import ArrayLike

from optserve.limits import MESSAGE_BYTES_MAX, MESSAGE_HEADROOM_BYTES
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionStatus
from optserve.v1.tensor_pb2 import Tensor, TensorHeader
from optserve.wire import Buffer, byte_count, whole
from optserve_client import _exchange as exchanges
from optserve_client._effects import Collect, Operation, Train, ask
from optserve_client._encoded import GradientSources
from optserve_client._incoming import Room, arrays_of
from optserve_client._refusals import from_refusal
from optserve_client._shared_lane import SharedLane
from optserve_client._spec import UpdateOptions, Via, update_request
from optserve_client.config import ClientConfig
from optserve_client.errors import (
    DeadlineError,
    LimitError,
    ParametersNotSetError,
    SharedMemoryError,
    UnknownNameError,
)
from optserve_client.progress import TransferReporter
from optserve_client.results import Parameters, StepResult, step_result
from optserve_client.tensors import (
    Array,
    allocate,
    bytes_of,
    encode_as,
    form_of,
)

Gradients: TypeAlias = Mapping[str, ArrayLike | None]
"""By parameter. None, or nothing, is no gradient, which is not a gradient of zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which terms a client and its server have met."""

    config: ClientConfig
    chunk_bytes: int
    """Most tensor bytes in one message: what both allow."""
    reporter: TransferReporter


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
        self._forms = {name: form_of(header) for name, header in self._headers.items()}
        self._values: dict[str, Array] = {}
        # Of what steps bring: one holds the newest values, and the other waits for the next ones.
        self._rooms: list[Room] = []
        self._shared = SharedLane(session.spec.parameters)
        self._gradients = GradientSources(session.spec.wire.gradients)
        # What the answer to the last streamed step has brought: the next one may build on it.
        self._reference: list[Array] | None = None

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
        opened = yield from self._open(self.terms.config.timeout_s)
        return opened.status if opened else (yield from self.status())

    def gradient_buffers(self) -> Operation[dict[str, Array]]:
        """Return the arrays that gradients are best written to."""
        if self._via == "stream":
            yield from self._open(self.terms.config.timeout_s)
        return dict(zip(self._headers, self._shared.buffers, strict=True))

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
            self._bytes_of(header, gradient, at) for at, (header, gradient) in enumerate(present)
        ]
        number = self.steps + 1 if step is None else step
        headers = [header for header, _ in present]
        take = self._step_unary if (via or self._via) == "unary" else self._step_stream
        try:
            result, arrays = yield from take(number, headers, tensors)
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

    def _step_stream(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Operation[tuple[pb.StepResult, list[Array]]]:
        yield from self._open(self.terms.config.step_timeout_s)
        if not self._shared.closed_because:
            return (yield from self._step_shared(number, headers, tensors))
        expected = list(self._headers.values())
        every = len(headers) == len(expected)
        step: exchanges.PackedStep | exchanges.Step
        sources = self._gradients.of(number, [header.name for header in headers], tensors)
        if every and sum(map(len, tensors)) <= self.terms.chunk_bytes:
            step = exchanges.PackedStep(number, sources, expected, self._reference)
        else:
            begin = pb.StepBegin(
                step=number, gradients=() if every else headers, every_parameter=every
            )
            step = exchanges.Step(
                begin,
                sources,
                expected,
                self._spare(),
                chunk_bytes=self.terms.chunk_bytes,
                reference=self._reference,
            )
        yield Train(
            opening=self._opening(),
            exchange=step,
            timeout_s=self.terms.config.step_timeout_s,
        )
        if step.refusal is not None:
            raise from_refusal(step.refusal)
        assert step.result is not None
        assert step.parameters is not None
        self._rooms.reverse()  # What has come stays; the other one is spare now.
        self._gradients.answered(number)
        self._reference = step.parameters
        return step.result, step.parameters

    def _step_shared(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Operation[tuple[pb.StepResult, list[Array]]]:
        present = {header.name: tensor for header, tensor in zip(headers, tensors, strict=True)}
        absent = []
        for position, name in enumerate(self._headers):
            if name in present:
                self._shared.write(position, present[name])
            else:
                absent.append(position)
        step = exchanges.SharedStep(number, absent)
        yield Train(
            opening=self._opening(),
            exchange=step,
            timeout_s=self.terms.config.step_timeout_s,
        )
        if step.refusal is not None:
            raise from_refusal(step.refusal)
        assert step.result is not None
        return step.result, self._shared.parameters

    def _step_unary(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Operation[tuple[pb.StepResult, list[Array]]]:
        expected = list(self._headers.values())
        check_unary_fits(expected)
        sources = self._gradients.of(number, [header.name for header in headers], tensors)
        request = pb.StepRequest(
            session_id=self.session_id,
            worker=self.worker,
            step=number,
            gradients=[
                Tensor(header=header, data=whole(source))
                for header, source in zip(headers, sources, strict=True)
            ],
        )
        timeout_s = self.terms.config.step_timeout_s
        response = yield from ask("Step", request, pb.StepResponse, timeout_s)
        exchanges.check_announced([tensor.header for tensor in response.parameters], expected)
        data = [tensor.data for tensor in response.parameters]
        arrays = arrays_of(expected, data, response.encoding)
        self._gradients.answered(number)
        return response.result, arrays

    def _opening(self) -> exchanges.Opening:
        asks = self.terms.config.lane != "grpc"
        return exchanges.Opening(self.session_id, self.worker, shared_memory=asks)

    def _open(self, timeout_s: float) -> Operation[pb.TrainOpened | None]:
        """Open the worker's stream, and enter the lane; None if the stream is open already.

        Raises:
            SharedMemoryError: There is no shared memory, and it must be.
        """
        opening = self._opening()
        yield Train(opening=opening, exchange=None, timeout_s=timeout_s)
        if opening.opened:
            self._shared.take(opening.opened)
        if self.terms.config.lane == "shm" and self._shared.closed_because:
            raise SharedMemoryError(f"no shared memory: {self._shared.closed_because}")
        return opening.opened

    def _spare(self) -> Room:
        """Return memory for parameters that does not hold the newest ones.

        Used again every other step: to take it anew each time costs more than to fill it.
        """
        if len(self._rooms) < 2:
            self._rooms.insert(0, Room(list(self._headers.values())))
        return self._rooms[0]

    def _bytes_of(self, header: TensorHeader, gradient: ArrayLike, at: int) -> memoryview:
        values = np.asarray(gradient)
        if (values.dtype, values.shape) == self._forms[header.name]:
            return bytes_of(values)
        return encode_as(header, values, role="gradient", path=f"gradients[{at}]")

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


def check_unary_fits(headers: Iterable[TensorHeader]) -> None:
    """Check that all parameters fit into the answer of a unary step.

    Raises:
        LimitError: They do not.
    """
    total, allowed = total_bytes(headers), MESSAGE_BYTES_MAX - MESSAGE_HEADROOM_BYTES
    if total > allowed:
        raise LimitError.local(
            f"a unary step carries all parameters in one message; they have {total} bytes,"
            f" and {allowed} fit: take steps via the stream",
            expected=f"at most {allowed} bytes",
            actual=f"{total} bytes",
        )


def total_bytes(headers: Iterable[TensorHeader]) -> int:
    return sum(byte_count(header) for header in headers)
