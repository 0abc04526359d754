"""A server on this host, whose steps are taken in shared memory: as the contract says, by hand."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from drivers import StepAnswer, Tensors
from drivers_grpc import StubDriver, StubWorker, opening
from messages import DTYPES, bytes_of, header_of, tensors_of
from refusals import RefusedError, translated
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1 import tensor_pb2
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve.v1.tensor_pb2 import TensorHeader

ALIGNMENT = HEAD_BYTES = 64
_TOKEN_BYTES = 16


class SharedDriver(StubDriver):
    """Takes steps in shared memory; those that it has no form for, as any client may."""

    @contextmanager
    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> Iterator[SharedWorker]:
        stream = SharedWorker(self.stub, self.get(session_id).spec.parameters)
        with stream.opened(opening(session_id, worker, client_id)):
            yield stream


class SharedWorker(StubWorker):
    """One worker's stream, with its memory mapped."""

    offer: pb.SharedMemory

    def __init__(self, stub: OptimizerServiceStub, headers: Sequence[TensorHeader]) -> None:
        super().__init__(stub)
        self._headers = headers

    def open(self, opening: pb.TrainOpen) -> pb.TrainOpened:
        """Open the stream, and map what is offered."""
        opening.shared_memory = True
        opened = super().open(opening)
        assert opened.HasField("shared_memory")
        self.offer = opened.shared_memory
        process = self.offer.process
        self.parameters = SharedTensors(process, self.offer.parameters, self._headers)
        self.gradients = SharedTensors(process, self.offer.gradients, self._headers, writable=True)
        return opened

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        headers = {header.name: header for header in self._headers}
        if any(header_of(name, each) != headers.get(name) for name, each in gradients.items()):
            return super().start(step, gradients, digest)
        for name, gradient in gradients.items():
            self.gradients.write(name, gradient)
        absent = [at for at, header in enumerate(self._headers) if header.name not in gradients]
        return self.send_shared(step, absent, digest)

    def send_shared(
        self, step: int, absent: Sequence[int], digest: bytes = b""
    ) -> Future[StepAnswer]:
        """Send a step with the gradients that lie in the memory."""
        shared = pb.SharedStep(step=step, absent=absent, digest=digest)
        self._requests.put(pb.TrainRequest(shared=shared))
        return self.receiver.submit(self._receive_shared)

    def _receive_shared(self) -> StepAnswer:
        with translated():
            answer = next(self._responses)
        if answer.HasField("refused"):
            raise RefusedError.from_message(answer.refused.refusal)
        assert answer.HasField("result")
        return StepAnswer(result=answer.result, parameters=self.parameters.read())


class SharedTensors:
    """Tensors in memory of a server on this host."""

    def __init__(
        self,
        process: int,
        region: pb.SharedRegion,
        headers: Sequence[TensorHeader],
        *,
        writable: bool = False,
    ) -> None:
        """Map the region, whose tensors have ``headers``."""
        path = f"/proc/{process}/fd/{region.descriptor}"
        descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            assert os.fstat(descriptor).st_size == region.byte_count
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.memory = mmap.mmap(descriptor, region.byte_count, prot=prot)
        finally:
            os.close(descriptor)
        assert len(region.token) == _TOKEN_BYTES
        assert self.memory[:_TOKEN_BYTES] == region.token
        self._headers = headers
        self.places: dict[str, slice] = {}
        """Where each tensor's bytes are."""
        begin = HEAD_BYTES
        for header in headers:
            count = math.prod(header.shape) * DTYPES[header.data_type].itemsize
            self.places[header.name] = slice(begin, begin + count)
            begin += -(-count // ALIGNMENT) * ALIGNMENT
        assert begin == region.byte_count

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where it belongs."""
        self.memory[self.places[name]] = bytes_of(tensor)

    def read(self) -> dict[str, Tensor]:
        """Return copies of all tensors."""
        return tensors_of(
            tensor_pb2.Tensor(header=header, data=self.memory[self.places[header.name]])
            for header in self._headers
        )
