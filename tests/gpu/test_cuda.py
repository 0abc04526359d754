"""The parity tables on a CUDA device: a session there is torch.optim and torch.nn there.

The same kernels run on the same device, so that the same bits are to be expected; what is promised
is what the tolerances below say, because a kernel may add up in another order from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drivers import Driver
from drivers_grpc import StubDriver
from messages import headers_of
from parity.cases import OptimizerCase, SchedulerCase
from parity.loss_cases import LOSSES, LossCase
from parity.test_optimizers import TABLE
from parity.trajectories import hyperparameters_of, initial_parameters, local, served, spec_of
from server_process import running_server

from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.session_pb2 import SessionSpec

RELATIVE, ABSOLUTE = 1e-5, 1e-6  # Some hundred units in the last place of FP32, after fifty steps.

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_driver() -> Iterator[Driver]:
    """Drive a server process whose sessions live on the CUDA device."""
    with running_server("--device", "cuda") as process, StubDriver(process.address) as driver:
        yield driver


@pytest.mark.parametrize("groups", [1, 2], ids=["one-group", "two-groups"])
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name if pair[1] else 'no-schedule'}")
        for pair in TABLE
    ],
)
def test_fifty_steps_on_the_device_are_those_of_torch_there(
    cuda_driver: Driver, optimizer: OptimizerCase, scheduler: SchedulerCase | None, groups: int
) -> None:
    session = cuda_driver.create(spec_of(optimizer, scheduler, groups), initial_parameters())
    assert session.status.device.startswith("cuda")
    through_server = served(cuda_driver, session, scheduler)
    cuda_driver.delete(session.status.session_id)
    by_torch = local(optimizer, scheduler, hyperparameters_of(optimizer, session), device="cuda")
    assert through_server.rates == by_torch.rates
    for came, wanted in zip(through_server.parameters, by_torch.parameters, strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(came[name], tensor, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's word on KLDivLoss.
@pytest.mark.parametrize("case", LOSSES, ids=[case.name for case in LOSSES])
def test_a_loss_and_its_gradient_on_the_device_are_those_of_torch_there(
    cuda_driver: Driver, case: LossCase
) -> None:
    spec = SessionSpec(
        parameters=headers_of({"w": torch.zeros(())}),
        optimizer=Optimizer(sgd=SGD()),
        loss=case.message(),
    )
    session_id = cuda_driver.create(spec).status.session_id
    came = cuda_driver.evaluate(session_id, case.predictions, case.targets, gradient=True)
    cuda_driver.delete(session_id)

    predictions = case.predictions.cuda().requires_grad_()
    loss = case.build().cuda()(predictions, case.targets.cuda()).sum()
    (gradient,) = torch.autograd.grad(loss, predictions)
    assert came.result.loss == pytest.approx(loss.item(), rel=RELATIVE, abs=ABSOLUTE, nan_ok=True)
    assert came.gradient is not None
    torch.testing.assert_close(
        came.gradient, gradient.cpu(), rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True
    )
