"""A server whose steps come in the forms of those that have a gradient for every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Literal, TypeAlias

from drivers import StepAnswer, Tensors
from drivers_grpc import StubDriver, StubWorker, opening
from messages import bytes_of, chunks_of, header_of, tensors_of
from refusals import RefusedError, translated

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve.v1.tensor_pb2 import Tensor, TensorHeader

Form: TypeAlias = Literal["announced", "every-parameter", "packed"]
FORMS: tuple[Form, ...] = ("announced", "every-parameter", "packed")


class FormDriver(StubDriver):
    """Takes steps in one form; those that it cannot have, as any client may."""

    def __init__(self, address: str, form: Form) -> None:
        super().__init__(address)
        self._form: Form = form

    @contextmanager
    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> Iterator[FormWorker]:
        stream = FormWorker(self.stub, self.get(session_id).spec.parameters, self._form)
        with stream.opened(opening(session_id, worker, client_id)):
            yield stream


class FormWorker(StubWorker):
    """One worker's stream, whose steps come in one form; another one may be chosen any time."""

    form: Form

    def __init__(
        self, stub: OptimizerServiceStub, headers: Sequence[TensorHeader], form: Form
    ) -> None:
        super().__init__(stub)
        self._headers = headers
        self.form = form

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        whole = {name: header_of(name, each) for name, each in gradients.items()}
        if self.form == "announced" or whole != {each.name: each for each in self._headers}:
            return super().start(step, gradients, digest)
        ordered = [gradients[header.name] for header in self._headers]
        data = [bytes_of(gradient) for gradient in ordered]
        if self.form == "packed" and sum(map(len, data)) <= CHUNK_BYTES_MAX:
            packed = pb.PackedStep(step=step, gradients=data, digest=digest)
            self._requests.put(pb.TrainRequest(packed=packed))
            return self.receiver.submit(self._receive_packed)
        begin = pb.StepBegin(step=step, every_parameter=True)
        self._requests.put(pb.TrainRequest(begin=begin))
        for chunks in chunks_of(ordered):
            self._requests.put(pb.TrainRequest(chunks=chunks))
        self._requests.put(pb.TrainRequest(end=pb.StepEnd(digest=digest)))  # Known only now.
        return self.receiver.submit(self._receive, self._headers)

    def _receive_packed(self) -> StepAnswer:
        with translated():
            answer = next(self._responses)
        if answer.HasField("refused"):
            raise RefusedError.from_message(answer.refused.refusal)
        assert answer.HasField("packed")
        named = zip(self._headers, answer.packed.parameters, strict=True)
        parameters = tensors_of(Tensor(header=header, data=data) for header, data in named)
        return StepAnswer(result=answer.packed.result, parameters=parameters)
