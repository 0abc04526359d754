"""EvaluateLoss is torch.nn: the loss, its elements and its gradient, bit for bit on the CPU."""

from __future__ import annotations

import pytest
import torch
from drivers import Driver, Evaluation
from drivers_grpc import StubDriver
from messages import bytes_of, header_of, headers_of
from parity.loss_cases import LOSSES, LossCase
from torch import Tensor

from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.optimizer_service_pb2 import LossBegin
from optserve.v1.session_pb2 import SessionSpec


def _session(driver: Driver, case: LossCase) -> str:
    spec = SessionSpec(
        parameters=headers_of({"w": torch.zeros(())}),
        optimizer=Optimizer(sgd=SGD()),
        loss=case.message(),
    )
    return driver.create(spec).status.session_id


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's word on KLDivLoss.
@pytest.mark.parametrize("case", LOSSES, ids=[case.name for case in LOSSES])
def test_a_loss_and_its_gradient_are_those_of_torch(process_driver: Driver, case: LossCase) -> None:
    session_id = _session(process_driver, case)
    came = process_driver.evaluate(session_id, case.predictions, case.targets, gradient=True)
    process_driver.delete(session_id)
    _assert_torch_agrees(case, came)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_holds_for_tensors_of_many_chunks(process_driver: StubDriver, reduction: str) -> None:
    generator = torch.Generator().manual_seed(4)
    case = LossCase(
        name="large",
        kind="CrossEntropyLoss",
        arguments={"reduction": reduction},
        predictions=torch.randn(3001, 401, generator=generator),  # 4.6 MiB
        targets=torch.randint(0, 401, (3001,), generator=generator),
    )
    session_id = _session(process_driver, case)
    begin = LossBegin(
        session_id=session_id,
        gradient=True,
        predictions=header_of("", case.predictions),
        targets=header_of("", case.targets),
    )
    came = process_driver.evaluate_stream(begin, [case.predictions, case.targets])
    process_driver.delete(session_id)
    _assert_torch_agrees(case, came)


def test_the_table_has_every_loss_and_every_argument_of_the_contract() -> None:
    for arm in Loss.DESCRIPTOR.oneofs_by_name["kind"].fields:
        assert arm.message_type is not None
        cases = [case for case in LOSSES if case.kind == arm.message_type.name]
        tested = {name for case in cases for name in case.arguments}
        assert tested == {field.name for field in arm.message_type.fields}


def _assert_torch_agrees(case: LossCase, came: Evaluation) -> None:
    inputs = case.predictions.clone().requires_grad_()
    values: Tensor = case.build()(inputs, case.targets)
    total = values.sum()
    (gradient,) = torch.autograd.grad(total, inputs)
    assert bytes_of(torch.tensor(came.result.loss)) == bytes_of(torch.tensor(total.item()))
    assert came.gradient is not None
    assert bytes_of(came.gradient) == bytes_of(gradient)
    assert (came.elements is not None) == (case.arguments.get("reduction") == "none")
    if came.elements is not None:
        assert came.elements.shape == values.shape
        assert bytes_of(came.elements) == bytes_of(values)
