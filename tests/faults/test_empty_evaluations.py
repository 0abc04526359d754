"""Tensors without elements are right; huge ones without elements are not."""

from __future__ import annotations

import pytest
from drivers_grpc import StubDriver
from refusals import refused, translated

from optserve.v1.loss_pb2 import CrossEntropyLoss, Loss
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.optimizer_service_pb2 import EvaluateLossRequest
from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.tensor_pb2 import DataType, Tensor, TensorHeader

FP32, INT64 = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_INT64


@pytest.mark.parametrize(
    ("predictions", "targets", "data_type"),
    [((1 << 40, 5, 0), (1 << 40, 0), INT64), ((1 << 29, 0), (1 << 29, 0), FP32)],
    ids=["classes", "probabilities"],
)
def test_a_huge_evaluation_of_nothing_is_refused_before_torch_walks_along_it(
    process_driver: StubDriver,
    predictions: tuple[int, ...],
    targets: tuple[int, ...],
    data_type: DataType.ValueType,
) -> None:
    spec = SessionSpec(
        parameters=[TensorHeader(name="w", data_type=FP32)],
        optimizer=Optimizer(sgd=SGD()),
        loss=Loss(cross_entropy_loss=CrossEntropyLoss()),
    )
    session_id = process_driver.create(spec).status.session_id
    request = EvaluateLossRequest(
        session_id=session_id,
        predictions=Tensor(header=TensorHeader(data_type=FP32, shape=predictions)),
        targets=Tensor(header=TensorHeader(data_type=data_type, shape=targets)),
    )
    with refused("LIMIT_EXCEEDED", field="predictions"), translated():
        process_driver.stub.EvaluateLoss(request, timeout=20)
    process_driver.delete(session_id)
