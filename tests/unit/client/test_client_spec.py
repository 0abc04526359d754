from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from google.protobuf.message import Message

from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.scheduler_pb2 import Scheduler, ScheduleUnit
from optserve.v1.session_pb2 import NonFinitePolicy
from optserve_client import ParameterGroup, lr_scheduler, nn, optim
from optserve_client._spec import session_spec, update_request
from optserve_client.tensors import announce

HEADERS = [announce("w", np.dtype("f4"), (2,)), announce("b", np.dtype("f4"), ())]


@pytest.mark.parametrize(
    ("choice", "module"),
    [
        pytest.param(Optimizer, optim, id="optimizers"),
        pytest.param(Scheduler, lr_scheduler, id="schedulers"),
        pytest.param(Loss, nn, id="losses"),
    ],
)
def test_everything_that_the_contract_offers_is_offered(
    choice: type[Message], module: ModuleType
) -> None:
    arms = choice.DESCRIPTOR.oneofs_by_name["kind"].fields
    offered = {arm.message_type.name for arm in arms if arm.message_type is not None}
    assert offered == {
        name
        for name in module.__all__
        if isinstance(getattr(module, name), type) and issubclass(getattr(module, name), Message)
    }


def test_a_spec_says_what_was_said_and_leaves_the_rest_to_the_server() -> None:
    spec = session_spec(
        HEADERS,
        optimizer=optim.SGD(lr=0.5),
        scheduler=lr_scheduler.StepLR(step_size=3),
        schedule_unit="epochs",
        groups=[ParameterGroup(name="bias", parameters=["b"], overrides=optim.SGD(lr=0.1))],
        loss=nn.MSELoss(),
        workers=2,
    )
    assert list(spec.parameters) == HEADERS
    assert spec.optimizer == Optimizer(sgd=SGD(lr=0.5))
    assert not spec.optimizer.sgd.HasField("momentum")
    assert spec.scheduler.step_lr.step_size == 3
    assert spec.scheduler.unit == ScheduleUnit.SCHEDULE_UNIT_EPOCHS
    assert spec.groups[0].overrides.sgd.lr == 0.1
    assert spec.loss.WhichOneof("kind") == "mse_loss"
    assert spec.workers == 2
    assert not spec.limits.HasField("loss_points_max")


def test_an_optimizer_with_nothing_but_defaults_is_still_chosen() -> None:
    assert session_spec(HEADERS, optimizer=optim.Adamax()).optimizer.HasField("adamax")


def test_a_session_without_schedule_or_loss_has_none() -> None:
    spec = session_spec(HEADERS, optimizer=optim.Adam())
    assert not spec.HasField("scheduler")
    assert not spec.HasField("loss")


def test_something_else_than_an_optimizer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be one of SGD, Adam, .*not str"):
        session_spec(HEADERS, optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scheduler must be one of StepLR, .*not Adam"):
        session_spec(
            HEADERS,
            optimizer=optim.Adam(),
            scheduler=optim.Adam(),  # type: ignore[arg-type]
        )


def test_a_schedule_counts_steps_or_epochs_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="'steps' or 'epochs', not 'batches'"):
        session_spec(
            HEADERS,
            optimizer=optim.Adam(),
            scheduler=lr_scheduler.ExponentialLR(gamma=0.9),
            schedule_unit="batches",  # type: ignore[arg-type]
        )


def test_a_misspelt_hyperparameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        optim.Adam(learning_rate=0.1)  # type: ignore[call-arg]


def test_an_update_leaves_what_it_does_not_name() -> None:
    request = update_request("id", groups=[ParameterGroup(name="bias", overrides=optim.SGD(lr=1))])
    assert not request.HasField("optimizer")
    assert not request.HasField("display_name")
    assert request.non_finite == NonFinitePolicy.NON_FINITE_POLICY_UNSPECIFIED
    assert update_request("id", allow_non_finite=False).non_finite == (
        NonFinitePolicy.NON_FINITE_POLICY_REFUSE
    )
