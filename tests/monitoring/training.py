"""A short training run, told to the server in the contract's own messages."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import grpc
import pytest

from optserve.v1.loss_pb2 import CrossEntropyLoss, Loss
from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.optimizer_service_pb2 import (
    CreateSessionRequest,
    DeleteSessionRequest,
    EvaluateLossRequest,
    StepBegin,
    StepEnd,
    StepRequest,
    TrainOpen,
    TrainRequest,
)
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve.v1.session_pb2 import SessionSpec, Split
from optserve.v1.tensor_pb2 import DataType, Tensor, TensorChunk, TensorChunks, TensorHeader

UNARY_STEPS, STREAM_STEPS = 4, 6
STEPS = UNARY_STEPS + STREAM_STEPS
TIMEOUT_S = 20.0

WEIGHT = TensorHeader(name="weight", data_type=DataType.DATA_TYPE_FP32, shape=[2, 3])
GRADIENT = struct.pack("<6f", 1, -1, 2, -2, 3, -3)
LOGITS = Tensor(
    header=TensorHeader(data_type=DataType.DATA_TYPE_FP32, shape=[2, 3]),
    data=struct.pack("<6f", 5, 0, 0, 0, 5, 0),
)
CLASSES = Tensor(  # The first prediction is right, the second is wrong.
    header=TensorHeader(data_type=DataType.DATA_TYPE_INT64, shape=[2]),
    data=struct.pack("<2q", 0, 2),
)


@contextmanager
def connected(address: str) -> Iterator[OptimizerServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield OptimizerServiceStub(channel)


def train(stub: OptimizerServiceStub) -> str:
    """Create a session, make ``STEPS`` steps both ways, evaluate both losses, be refused once.

    Returns:
        The session's id.
    """
    spec = SessionSpec(
        parameters=[WEIGHT],
        optimizer=Optimizer(adam=Adam(lr=0.125)),
        loss=Loss(cross_entropy_loss=CrossEntropyLoss()),
    )
    request = CreateSessionRequest(spec=spec, values=[Tensor(header=WEIGHT, data=bytes(24))])
    session_id = stub.CreateSession(request, timeout=TIMEOUT_S).session.status.session_id
    for step in range(1, UNARY_STEPS + 1):
        stub.Step(step_request(session_id, step), timeout=TIMEOUT_S)
    stream_steps(stub, session_id, range(UNARY_STEPS + 1, STEPS + 1))
    for split in (Split.SPLIT_TRAIN, Split.SPLIT_VALIDATION):
        evaluation = EvaluateLossRequest(
            session_id=session_id, split=split, predictions=LOGITS, targets=CLASSES
        )
        stub.EvaluateLoss(evaluation, timeout=TIMEOUT_S)
    be_refused(stub, session_id)
    return session_id


def delete(stub: OptimizerServiceStub, session_id: str) -> None:
    stub.DeleteSession(DeleteSessionRequest(session_id=session_id), timeout=TIMEOUT_S)


def step_request(session_id: str, step: int) -> StepRequest:
    gradient = Tensor(header=WEIGHT, data=GRADIENT)
    return StepRequest(session_id=session_id, step=step, gradients=[gradient])


def stream_steps(stub: OptimizerServiceStub, session_id: str, steps: range) -> None:
    requests: SimpleQueue[TrainRequest | None] = SimpleQueue()
    responses = stub.Train(iter(requests.get, None), timeout=TIMEOUT_S)
    requests.put(TrainRequest(open=TrainOpen(session_id=session_id)))
    assert next(responses).WhichOneof("event") == "opened"
    for step in steps:
        chunks = TensorChunks(chunks=[TensorChunk(data=GRADIENT)])
        requests.put(TrainRequest(begin=StepBegin(step=step, gradients=[WEIGHT])))
        requests.put(TrainRequest(chunks=chunks))
        requests.put(TrainRequest(end=StepEnd()))
        events = [next(responses).WhichOneof("event") for _ in range(3)]
        assert events == ["begin", "chunks", "result"]
    requests.put(None)
    assert list(responses) == []


def be_refused(stub: OptimizerServiceStub, session_id: str) -> None:
    request = step_request(session_id, STEPS + 1)
    request.gradients[0].header.shape[:] = [3, 2]
    with pytest.raises(grpc.RpcError) as refused:
        stub.Step(request, timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
