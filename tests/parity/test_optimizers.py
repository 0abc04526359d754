"""A session is torch.optim: on the CPU, bit for bit, step by step."""

from __future__ import annotations

import pytest
import torch
from drivers import Driver, take
from messages import bytes_of, headers_of
from parity.cases import OPTIMIZERS, SCHEDULERS, OptimizerCase, SchedulerCase
from parity.trajectories import (
    assert_same_bits,
    hyperparameters_of,
    initial_parameters,
    local,
    served,
    spec_of,
)

from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.scheduler_pb2 import Scheduler
from optserve.v1.session_pb2 import SessionSpec

FIRST_OF_KIND = {case.kind: case for case in reversed(OPTIMIZERS)}
"""One case of each optimizer meets every scheduler; each of the others meets one, in turn."""

TABLE = [
    (optimizer, scheduler)
    for at, optimizer in enumerate(OPTIMIZERS)
    for scheduler in (
        SCHEDULERS
        if optimizer is FIRST_OF_KIND[optimizer.kind]
        else [SCHEDULERS[at % len(SCHEDULERS)]]
    )
]


@pytest.fixture(params=["stream", "shared-memory"])
def remote_driver(
    request: pytest.FixtureRequest, process_driver: Driver, shared_driver: Driver
) -> Driver:
    """Reach a real server in each of the lanes."""
    return process_driver if request.param == "stream" else shared_driver


def _id(optimizer: OptimizerCase, scheduler: SchedulerCase | None) -> str:
    return f"{optimizer.name}-{scheduler.name if scheduler else 'no-schedule'}"


@pytest.mark.parametrize("groups", [1, 2], ids=["one-group", "two-groups"])
@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [pytest.param(*pair, id=_id(*pair)) for pair in TABLE]
)
def test_fifty_steps_through_a_real_server_are_those_of_torch(
    remote_driver: Driver, optimizer: OptimizerCase, scheduler: SchedulerCase | None, groups: int
) -> None:
    spec = spec_of(optimizer, scheduler, groups)
    session = remote_driver.create(spec, initial_parameters())
    through_server = served(remote_driver, session, scheduler)
    remote_driver.delete(session.status.session_id)
    by_torch = local(optimizer, scheduler, hyperparameters_of(optimizer, session))
    assert_same_bits(through_server, by_torch)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"]
)
@pytest.mark.parametrize(
    "optimizer", FIRST_OF_KIND.values(), ids=[case.name for case in FIRST_OF_KIND.values()]
)
def test_it_holds_for_other_data_types(
    remote_driver: Driver, optimizer: OptimizerCase, dtype: torch.dtype
) -> None:
    spec = spec_of(optimizer, None, 1, dtype)
    session = remote_driver.create(spec, initial_parameters(dtype))
    through_server = served(remote_driver, session, None, dtype)
    remote_driver.delete(session.status.session_id)
    by_torch = local(optimizer, None, hyperparameters_of(optimizer, session), dtype)
    assert_same_bits(through_server, by_torch)


@pytest.mark.parametrize(
    "optimizer", FIRST_OF_KIND.values(), ids=[case.name for case in FIRST_OF_KIND.values()]
)
def test_it_holds_for_tensors_of_many_chunks(
    remote_driver: Driver, optimizer: OptimizerCase
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(701, 1009, generator=generator)  # 2.7 MiB; no round number of anything.
    gradients = [torch.randn(weight.shape, generator=generator) for _ in range(3)]
    spec = SessionSpec(
        parameters=headers_of({"weight": weight}),
        optimizer=optimizer.message(optimizer.hyperparameters),
    )
    session = remote_driver.create(spec)
    remote_driver.upload(session.status.session_id, {"weight": weight})
    torch_optimizer = optimizer.torch_class(
        [weight], **hyperparameters_of(optimizer, session)["default"]
    )
    with remote_driver.worker(session.status.session_id) as worker:
        for step, gradient in enumerate(gradients, start=1):
            came = take(worker, step, {"weight": gradient}).parameters["weight"]
            weight.grad = gradient
            torch_optimizer.step()
            assert bytes_of(came) == bytes_of(weight)
    remote_driver.delete(session.status.session_id)


def test_the_table_has_every_optimizer_and_every_scheduler_of_the_contract() -> None:
    for kinds, choice in (
        ({case.kind for case in OPTIMIZERS}, Optimizer),
        ({case.kind for case in SCHEDULERS if case}, Scheduler),
    ):
        arms = choice.DESCRIPTOR.oneofs_by_name["kind"].fields
        assert kinds == {arm.message_type.name for arm in arms if arm.message_type}
