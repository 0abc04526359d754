"""Optimizers, schedules and losses that cannot be: each mistake is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from faults.ground import Mistakes, rich_spec
from faults.spec_changes import (
    FP32,
    Change,
    lost,
    optimized,
    scheduled,
)
from google.protobuf.descriptor import FieldDescriptor
from messages import message_of

from optserve.v1 import optimizer_pb2
from optserve.v1.loss_pb2 import (
    BCELoss,
    CrossEntropyLoss,
    MSELoss,
    NLLLoss,
    Reduction,
)
from optserve.v1.optimizer_pb2 import SGD, Adagrad, Adam, Optimizer, RMSprop
from optserve.v1.scheduler_pb2 import ExponentialLR, LambdaLR, MultiStepLR, StepLR
from optserve.v1.tensor_pb2 import Tensor, TensorHeader

MISTAKES: dict[str, tuple[Change, str, str]] = {
    # Optimizer
    "no-optimizer": (lambda s: s.ClearField("optimizer"), "MISSING_FIELD", "spec.optimizer"),
    "optimizer-of-no-kind": (
        lambda s: s.optimizer.CopyFrom(Optimizer()),
        "MISSING_FIELD",
        "spec.optimizer",
    ),
    "momentum-negative": (
        optimized(SGD(momentum=-0.1)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.sgd.momentum",
    ),
    "dampening-infinite": (
        optimized(SGD(dampening=math.inf)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.sgd.dampening",
    ),
    "betas-of-one": (
        optimized(Adam(betas=[0.9])),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.adam.betas",
    ),
    "betas-of-many": (
        optimized(Adam(betas=[0.9] * 100_000)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.adam.betas",
    ),
    "beta-of-one": (
        optimized(Adam(betas=[0.9, 1])),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.adam.betas[1]",
    ),
    "eps-not-a-number": (
        optimized(RMSprop(eps=math.nan)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.rmsprop.eps",
    ),
    "accumulator-negative": (
        optimized(Adagrad(initial_accumulator_value=-1)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer.adagrad.initial_accumulator_value",
    ),
    "rate-beyond-fp32": (
        optimized(Adam(lr=1e161, fused=False)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer",
    ),
    "nesterov-without-momentum": (
        optimized(SGD(nesterov=True)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer",
    ),
    "nesterov-with-dampening": (
        optimized(SGD(nesterov=True, momentum=0.9, dampening=0.1)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer",
    ),
    "fused-and-foreach": (
        optimized(Adam(fused=True, foreach=True)),
        "INVALID_HYPERPARAMETER",
        "spec.optimizer",
    ),
    # Scheduler
    "scheduler-of-no-kind": (scheduled(None), "MISSING_FIELD", "spec.scheduler"),
    "scheduler-of-no-known-unit": (
        scheduled(StepLR(step_size=1), 9),
        "INVALID_FIELD",
        "spec.scheduler.unit",
    ),
    "step-size-missing": (
        scheduled(StepLR(gamma=0.5)),
        "MISSING_FIELD",
        "spec.scheduler.step_lr.step_size",
    ),
    "step-size-of-zero": (
        scheduled(StepLR(step_size=0)),
        "INVALID_HYPERPARAMETER",
        "spec.scheduler.step_lr.step_size",
    ),
    "milestones-missing": (
        scheduled(MultiStepLR()),
        "MISSING_FIELD",
        "spec.scheduler.multi_step_lr.milestones",
    ),
    "milestone-of-zero": (
        scheduled(MultiStepLR(milestones=[3, 0])),
        "INVALID_HYPERPARAMETER",
        "spec.scheduler.multi_step_lr.milestones[1]",
    ),
    "gamma-missing": (
        scheduled(ExponentialLR()),
        "MISSING_FIELD",
        "spec.scheduler.exponential_lr.gamma",
    ),
    "gamma-not-a-number": (
        scheduled(ExponentialLR(gamma=math.nan)),
        "INVALID_HYPERPARAMETER",
        "spec.scheduler.exponential_lr.gamma",
    ),
    "expression-missing": (
        scheduled(LambdaLR()),
        "INVALID_FIELD",
        "spec.scheduler.lambda_lr",
    ),
    "expressions-of-both-kinds": (
        scheduled(LambdaLR(lr_lambda="1", group_lr_lambdas=["1", "1"])),
        "INVALID_FIELD",
        "spec.scheduler.lambda_lr",
    ),
    "expressions-too-few": (
        scheduled(LambdaLR(group_lr_lambdas=["1"])),
        "INVALID_FIELD",
        "spec.scheduler.lambda_lr.group_lr_lambdas",
    ),
    # Loss
    "loss-of-no-kind": (lost(None), "MISSING_FIELD", "spec.loss"),
    "reduction-unknown": (
        lost(MSELoss(reduction=9)),  # type: ignore[arg-type]
        "INVALID_FIELD",
        "spec.loss.mse_loss.reduction",
    ),
    "reduction-of-another-loss": (
        lost(MSELoss(reduction=Reduction.REDUCTION_BATCHMEAN)),
        "INVALID_FIELD",
        "spec.loss.reduction",
    ),
    "smoothing-above-one": (
        lost(CrossEntropyLoss(label_smoothing=1.5)),
        "INVALID_HYPERPARAMETER",
        "spec.loss.cross_entropy_loss.label_smoothing",
    ),
    "weight-of-too-few-bytes": (
        lost(NLLLoss(weight=Tensor(header=TensorHeader(data_type=FP32, shape=[4]), data=b"123"))),
        "BYTE_COUNT_MISMATCH",
        "spec.loss.nll_loss.weight.data",
    ),
    "weight-of-no-type": (
        lost(BCELoss(weight=Tensor())),
        "INVALID_FIELD",
        "spec.loss.bce_loss.weight.header.data_type",
    ),
    "class-weight-of-two-dimensions": (
        lost(CrossEntropyLoss(weight=message_of(torch.ones(2, 2)))),
        "SHAPE_MISMATCH",
        "spec.loss.weight",
    ),
}


@pytest.mark.parametrize(("change", "reason", "field"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_choice_is_refused_and_takes_nothing(
    mistakes: Mistakes, change: Change, reason: str, field: str
) -> None:
    wanted = rich_spec()
    change(wanted)
    with mistakes.refused(reason, field):
        mistakes.ground.driver.create(wanted)


ARMS = list(Optimizer.DESCRIPTOR.oneofs_by_name["kind"].fields)


@pytest.mark.parametrize("lr", [-1e-300, -math.inf, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("arm", ARMS, ids=[arm.name for arm in ARMS])
def test_a_rate_that_is_none_is_refused_by_every_optimizer(
    mistakes: Mistakes, arm: FieldDescriptor, lr: float
) -> None:
    assert arm.message_type is not None
    kind = getattr(optimizer_pb2, arm.message_type.name)(lr=lr)
    wanted = rich_spec()
    optimized(kind)(wanted)
    with mistakes.refused("INVALID_HYPERPARAMETER", f"spec.optimizer.{arm.name}.lr"):
        mistakes.ground.driver.create(wanted)


def test_a_misspelt_hyperparameter_cannot_even_be_written() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        Adam(learning_rate=0.1)  # type: ignore[call-arg]


EXPRESSIONS = {
    "an-attribute": "().__class__.__bases__[0].__subclasses__()",
    "an-import": "__import__('os').system('true')",
    "a-lambda": "(lambda: 1)()",
    "a-comprehension": "max([1 for _ in range(9 ** 9)])",
    "a-walrus": "(x := 1)",
    "a-formatted-text": "f'{epoch}'",
    "a-text": "'a' * 9",
    "an-exponent": "9 ** 9 ** 9 ** 9 ** 9",
    "a-large-exponent": "9 ** 4000000",
    "a-text-too-long": "1" + " + 1" * 200_000,
    "a-nest-too-deep": "(" * 250 + "1" + ")" * 250,
    "nots-too-many": "not " * 64 + "1",
    "signs-too-many": "-" * 250 + "1",
    "a-negative-factor": "-1",
    "no-number": "0 / epoch",
    "nothing": "",
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_an_expression_that_is_more_than_bounded_arithmetic_is_refused(
    mistakes: Mistakes, expression: str
) -> None:
    wanted = rich_spec()
    scheduled(LambdaLR(lr_lambda=expression))(wanted)
    with mistakes.refused("INVALID_EXPRESSION", "spec.scheduler.lambda_lr.lr_lambda"):
        mistakes.ground.driver.create(wanted)
