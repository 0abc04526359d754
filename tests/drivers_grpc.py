"""A server at an address, reached by the generated stubs; and a server in this process to reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import grpc
from drivers import Evaluation, StepAnswer, Tensors
from drivers_core import registry_on
from event_loop import TIMEOUT_S, EventLoopThread
from messages import (
    assembled,
    chunks_of,
    headers_of,
    message_of,
    messages_of,
    tensor_of,
)
from refusals import RefusedError, translated
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve.v1.session_pb2 import Session, SessionSpec, SessionStatus, Split
from optserve.v1.tensor_pb2 import TensorChunks, TensorHeader
from optserve_server.core.device import Device
from optserve_server.core.limits import WINDOW_BYTES, Limits
from optserve_server.rpc.server import Server


@contextmanager
def served_in_process(
    limits: Limits | None = None,
    window_bytes: int = WINDOW_BYTES,
    device: Device | None = None,
) -> Iterator[str]:
    """Serve gRPC on a free port, from an event loop in a thread of this process."""
    with (
        EventLoopThread() as loop,
        registry_on(loop, limits or Limits(), device=device) as registry,
    ):
        server = loop.call(lambda: Server(registry, window_bytes=window_bytes))
        yield loop.run(server.start("127.0.0.1", 0))
        loop.run(server.stop(0))


class StubDriver:
    """Speaks to a server with the generated stubs, on a connection of its own.

    gRPC lets the channels of a process share one, even one that has just been cut.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = self._stack.enter_context(grpc.insecure_channel(self._address, options=options))
        self.stub = OptimizerServiceStub(channel)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def create(
        self, spec: SessionSpec, values: Tensors | None = None, request_id: str = ""
    ) -> Session:
        request = pb.CreateSessionRequest(
            spec=spec, values=messages_of(values or {}), request_id=request_id
        )
        with translated():
            return self.stub.CreateSession(request, timeout=TIMEOUT_S).session

    def get(self, session_id: str) -> Session:
        request = pb.GetSessionRequest(session_id=session_id)
        with translated():
            return self.stub.GetSession(request, timeout=TIMEOUT_S).session

    def sessions(self, page_size: int = 0, page_token: str = "") -> pb.ListSessionsResponse:
        request = pb.ListSessionsRequest(page_size=page_size, page_token=page_token)
        with translated():
            return self.stub.ListSessions(request, timeout=TIMEOUT_S)

    def update(self, request: pb.UpdateSessionRequest) -> Session:
        with translated():
            return self.stub.UpdateSession(request, timeout=TIMEOUT_S).session

    def delete(self, session_id: str) -> SessionStatus:
        request = pb.DeleteSessionRequest(session_id=session_id)
        with translated():
            return self.stub.DeleteSession(request, timeout=TIMEOUT_S).status

    def upload(self, session_id: str, values: Tensors) -> SessionStatus:
        begin = pb.UploadBegin(session_id=session_id, parameters=headers_of(values))

        def requests() -> Iterator[pb.UploadParametersRequest]:
            yield pb.UploadParametersRequest(begin=begin)
            for chunks in chunks_of(values.values()):
                yield pb.UploadParametersRequest(chunks=chunks)

        with translated():
            return self.stub.UploadParameters(requests(), timeout=TIMEOUT_S).status

    def download(self, session_id: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
        request = pb.DownloadParametersRequest(session_id=session_id, names=names)
        with translated():
            responses = self.stub.DownloadParameters(request, timeout=TIMEOUT_S)
            begin = next(responses).begin
            return assembled(begin.parameters, (response.chunks for response in responses))

    @contextmanager
    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> Iterator[StubWorker]:
        stream = StubWorker(self.stub)
        with stream.opened(opening(session_id, worker, client_id)):
            yield stream

    def contribution(self, session_id: str, worker: int = 0) -> pb.GetContributionResponse:
        request = pb.GetContributionRequest(session_id=session_id, worker=worker)
        with translated():
            return self.stub.GetContribution(request, timeout=TIMEOUT_S)

    def end_epoch(self, session_id: str, epoch: int) -> SessionStatus:
        request = pb.EndEpochRequest(session_id=session_id, epoch=epoch)
        with translated():
            return self.stub.EndEpoch(request, timeout=TIMEOUT_S).status

    def evaluate(
        self,
        session_id: str,
        predictions: Tensor,
        targets: Tensor,
        *,
        split: Split.ValueType = Split.SPLIT_UNSPECIFIED,
        gradient: bool = False,
    ) -> Evaluation:
        request = pb.EvaluateLossRequest(
            session_id=session_id,
            split=split,
            gradient=gradient,
            predictions=message_of(predictions),
            targets=message_of(targets),
        )
        with translated():
            response = self.stub.EvaluateLoss(request, timeout=TIMEOUT_S)
        return Evaluation(
            result=response.result,
            gradient=tensor_of(response.gradient) if response.HasField("gradient") else None,
            elements=tensor_of(response.elements) if response.HasField("elements") else None,
        )

    def evaluate_stream(self, begin: pb.LossBegin, tensors: Sequence[Tensor]) -> Evaluation:
        """Evaluate tensors of any size: predictions and targets, which ``begin`` announces."""

        def requests() -> Iterator[pb.EvaluateLossStreamRequest]:
            yield pb.EvaluateLossStreamRequest(begin=begin)
            for chunks in chunks_of(tensors):
                yield pb.EvaluateLossStreamRequest(chunks=chunks)

        with translated():
            responses = self.stub.EvaluateLossStream(requests(), timeout=TIMEOUT_S)
            evaluated = next(responses).evaluated
            came = assembled(evaluated.tensors, (response.chunks for response in responses))
        return Evaluation(
            result=evaluated.result, gradient=came.get("gradient"), elements=came.get("elements")
        )

    def loss_points(self, request: pb.ListLossPointsRequest) -> pb.ListLossPointsResponse:
        with translated():
            return self.stub.ListLossPoints(request, timeout=TIMEOUT_S)


def opening(session_id: str, worker: int, client_id: bytes) -> pb.TrainOpen:
    """Return what opens a worker's stream."""
    return pb.TrainOpen(session_id=session_id, worker=worker, client_id=client_id)


class StubWorker:
    """One worker's stream; its answers are read in a thread of its own."""

    status: SessionStatus
    contribution: pb.Contribution | None

    def __init__(self, stub: OptimizerServiceStub) -> None:
        self.receiver = ThreadPoolExecutor(1)
        self._requests: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self._responses = stub.Train(iter(self._requests.get, None))

    @contextmanager
    def opened(self, opening: pb.TrainOpen) -> Iterator[None]:
        """Open the stream for a block."""
        with self.receiver:
            try:
                with translated():
                    self.open(opening)
                yield
            finally:
                self.leave()

    def open(self, opening: pb.TrainOpen) -> pb.TrainOpened:
        """Open the stream; return what it was answered with."""
        self._requests.put(pb.TrainRequest(open=opening))
        opened = next(self._responses).opened
        self.status = opened.status
        self.contribution = opened.contribution if opened.HasField("contribution") else None
        return opened

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        begin = pb.StepBegin(step=step, gradients=headers_of(gradients), digest=digest)
        self._requests.put(pb.TrainRequest(begin=begin))
        for chunks in chunks_of(gradients.values()):
            self._requests.put(pb.TrainRequest(chunks=chunks))
        self._requests.put(pb.TrainRequest(end=pb.StepEnd()))
        return self.receiver.submit(self._receive)

    def abandon(self) -> None:
        self._responses.cancel()

    def leave(self) -> None:
        """End the stream once the steps that were sent have been answered."""
        self._requests.put(None)
        with suppress(grpc.RpcError):  # It may have been ended already, and was told so.
            self.receiver.submit(lambda: list(self._responses)).result(TIMEOUT_S)

    def _next(self) -> pb.TrainResponse:
        return next(self._responses)

    def _receive(self, expected: Sequence[TensorHeader] | None = None) -> StepAnswer:
        """Receive an answer that announces the parameters, or else has those that are expected."""
        begin, chunks = None, list[TensorChunks]()
        with translated():
            while not (response := self._next()).HasField("result"):
                if response.HasField("refused"):  # Even now: what had come is void.
                    raise RefusedError.from_message(response.refused.refusal)
                if response.HasField("begin"):
                    begin, chunks = response.begin, []
                else:
                    chunks.append(response.chunks)
        assert begin is not None
        assert begin.step == response.result.step
        assert (expected is None) == bool(begin.parameters)
        parameters = assembled(expected or begin.parameters, chunks)
        return StepAnswer(result=response.result, parameters=parameters)
