"""Models that cannot be: parameters, groups and values are looked at before anything is taken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from faults.ground import Mistakes, rich_spec
from faults.spec_changes import (
    FP32,
    Change,
    encoded,
    group,
    grouped,
    long_names,
    many_parameters,
    named,
    shaped,
    typed,
)
from google.protobuf.message import Message
from messages import message_of
from refusals import translated
from scenarios.models import model

from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.optimizer_service_pb2 import CreateSessionRequest
from optserve.v1.tensor_pb2 import Tensor, TensorHeader

MISTAKES: dict[str, tuple[Change, str, str]] = {
    # Parameters
    "no-parameter": (lambda s: s.ClearField("parameters"), "MISSING_FIELD", "spec.parameters"),
    "name-empty": (named(""), "INVALID_NAME", "spec.parameters[0].name"),
    "name-with-nul": (named("a\x00b"), "INVALID_NAME", "spec.parameters[0].name"),
    "name-with-newline": (named("a\n"), "INVALID_NAME", "spec.parameters[0].name"),
    "name-with-escape": (named("\x1b[31m"), "INVALID_NAME", "spec.parameters[0].name"),
    "name-right-to-left": (named("\u202e"), "INVALID_NAME", "spec.parameters[0].name"),
    "name-overlong": (named("x" * 257), "LIMIT_EXCEEDED", "spec.parameters[0].name"),
    "name-overlong-in-bytes": (named("é" * 129), "LIMIT_EXCEEDED", "spec.parameters[0].name"),
    "name-absurd": (named("x" * 3_000_000), "LIMIT_EXCEEDED", "spec.parameters[0].name"),
    "name-twice": (named("b"), "INVALID_NAME", "spec.parameters[1].name"),
    "type-unset": (typed(0), "INVALID_FIELD", "spec.parameters[0].data_type"),
    "type-unknown": (typed(77), "INVALID_FIELD", "spec.parameters[0].data_type"),
    "type-of-integers": (typed(6), "INVALID_FIELD", "spec.parameters[0].data_type"),
    "type-of-truths": (typed(1), "INVALID_FIELD", "spec.parameters[0].data_type"),
    "shape-negative": (shaped(3, -5), "INVALID_FIELD", "spec.parameters[0].shape"),
    "shape-of-ten-terabytes": (shaped(2_500_000_000_000), "LIMIT_EXCEEDED", "spec.parameters"),
    "shape-that-overflows": (shaped(2**62, 2**62), "INVALID_FIELD", "spec.parameters[0].shape"),
    "shape-that-overflows-to-zero": (
        shaped(2**32, 2**32),
        "INVALID_FIELD",
        "spec.parameters[0].shape",
    ),
    "shape-huge-with-a-zero": (shaped(2**62, 4, 0), "INVALID_FIELD", "spec.parameters[0].shape"),
    "dimensions-too-many": (shaped(*[1] * 17), "LIMIT_EXCEEDED", "spec.parameters[0].shape"),
    "dimensions-absurd": (shaped(*[1] * 100_000), "LIMIT_EXCEEDED", "spec.parameters[0].shape"),
    "parameters-too-many": (many_parameters(10_001), "LIMIT_EXCEEDED", "spec.parameters"),
    "spec-too-large-to-answer": (long_names, "LIMIT_EXCEEDED", "spec.parameters"),
    # Groups
    "group-of-no-name": (grouped(group("", "b")), "INVALID_NAME", "spec.groups[0].name"),
    "group-twice": (
        grouped(group("a", "b"), group("a", "w")),
        "INVALID_NAME",
        "spec.groups[1].name",
    ),
    "group-of-nothing": (grouped(group("a")), "MISSING_FIELD", "spec.groups[0].parameters"),
    "group-of-a-stranger": (
        grouped(group("a", "b", "bias")),
        "UNKNOWN_NAME",
        "spec.groups[0].parameters[1]",
    ),
    "parameter-in-two-groups": (
        grouped(group("a", "b"), group("c", "b")),
        "UNKNOWN_NAME",
        "spec.groups[1].parameters[0]",
    ),
    "parameter-twice-in-a-group": (
        grouped(group("a", "b", "b")),
        "UNKNOWN_NAME",
        "spec.groups[0].parameters[1]",
    ),
    "default-group-that-names-parameters": (
        grouped(group("default", "b")),
        "INVALID_FIELD",
        "spec.groups[0].parameters",
    ),
    "group-of-another-optimizer": (
        grouped(group("a", "b", overrides=SGD(lr=1))),
        "INVALID_FIELD",
        "spec.groups[0].overrides",
    ),
    "group-with-a-negative-rate": (
        grouped(group("a", "b", overrides=Adam(lr=-1))),
        "INVALID_HYPERPARAMETER",
        "spec.groups[0].overrides.adam.lr",
    ),
    "groups-too-many": (
        grouped(*[group(str(i), "b") for i in range(101)]),
        "LIMIT_EXCEEDED",
        "spec.groups",
    ),
    # The rest
    "workers-too-many": (lambda s: setattr(s, "workers", 257), "LIMIT_EXCEEDED", "spec.workers"),
    "policy-unknown": (lambda s: setattr(s, "non_finite", 9), "INVALID_FIELD", "spec.non_finite"),
    "encoding-unknown": (
        lambda s: setattr(s.wire, "gradients", 77),
        "INVALID_FIELD",
        "spec.wire.gradients",
    ),
    "encoding-of-doubles": (encoded(9), "INVALID_FIELD", "spec.wire.parameters"),
    "encoding-of-halves": (encoded(7), "INVALID_FIELD", "spec.wire.parameters"),
    "display-name-with-nul": (
        lambda s: setattr(s, "display_name", "\x00"),
        "INVALID_NAME",
        "spec.display_name",
    ),
    "display-name-overlong": (
        lambda s: setattr(s, "display_name", "x" * 257),
        "LIMIT_EXCEEDED",
        "spec.display_name",
    ),
    "history-too-long": (
        lambda s: setattr(s.limits, "loss_points_max", 10_001),
        "LIMIT_EXCEEDED",
        "spec.limits.loss_points_max",
    ),
    "round-too-long": (
        lambda s: setattr(s.limits, "round_timeout_s", 601.0),
        "LIMIT_EXCEEDED",
        "spec.limits.round_timeout_s",
    ),
    "round-of-negative-time": (
        lambda s: setattr(s.limits, "round_timeout_s", -1.0),
        "INVALID_FIELD",
        "spec.limits.round_timeout_s",
    ),
    "round-of-no-time-at-all": (
        lambda s: setattr(s.limits, "round_timeout_s", math.nan),
        "INVALID_FIELD",
        "spec.limits.round_timeout_s",
    ),
}


@pytest.mark.parametrize(("change", "reason", "field"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_model_is_refused_and_takes_nothing(
    mistakes: Mistakes, change: Change, reason: str, field: str
) -> None:
    wanted = rich_spec()
    change(wanted)
    with mistakes.refused(reason, field):
        mistakes.ground.driver.create(wanted)


UNKNOWN = b"\xc0\x3e\x01"  # Field 1000: of a newer client, or of none.


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (lambda request: request, ""),
        (lambda request: request.spec, "spec"),
        (lambda request: request.spec.optimizer.adam, "spec.optimizer.adam"),
        (lambda request: request.spec.groups[0], "spec.groups[0]"),
        (lambda request: request.spec.scheduler.step_lr, "spec.scheduler.step_lr"),
        (lambda request: request.spec.parameters[1], "spec.parameters[1]"),
        (lambda request: request.values[0].header, "values[0].header"),
    ],
    ids=["request", "spec", "optimizer", "group", "scheduler", "parameter", "value"],
)
def test_a_field_that_the_server_does_not_know_is_refused_not_dropped(
    mistakes: Mistakes, place: Callable[[CreateSessionRequest], Message], field: str
) -> None:
    request = CreateSessionRequest(spec=rich_spec(), values=[message_of(model()["w"], "w")])
    place(request).MergeFromString(UNKNOWN)
    with mistakes.refused("UNKNOWN_FIELD", field), translated():
        mistakes.ground.driver.stub.CreateSession(request)


VALUES: dict[str, tuple[Tensor, str, str]] = {
    "name-unknown": (message_of(torch.ones(5), "v"), "UNKNOWN_NAME", "values[1].header.name"),
    "name-twice": (message_of(torch.ones(3, 5), "w"), "UNKNOWN_NAME", "values[1].header.name"),
    "shape": (message_of(torch.ones(1, 5), "b"), "SHAPE_MISMATCH", "values[1].header.shape"),
    "type": (
        message_of(torch.ones(5).double(), "b"),
        "DATA_TYPE_MISMATCH",
        "values[1].header.data_type",
    ),
    "byte-count": (
        Tensor(header=TensorHeader(name="b", data_type=FP32, shape=[5]), data=bytes(19)),
        "BYTE_COUNT_MISMATCH",
        "values[1].data",
    ),
    "header-missing": (Tensor(data=b"1234"), "UNKNOWN_NAME", "values[1].header.name"),
}


@pytest.mark.parametrize(("value", "reason", "field"), VALUES.values(), ids=VALUES)
def test_a_value_that_does_not_fit_is_refused_with_the_whole_session(
    mistakes: Mistakes, value: Tensor, reason: str, field: str
) -> None:
    request = CreateSessionRequest(spec=rich_spec(), values=[message_of(model()["w"], "w"), value])
    with mistakes.refused(reason, field), translated():
        mistakes.ground.driver.stub.CreateSession(request)


def test_a_huge_shape_with_a_zero_is_a_tensor_of_nothing(mistakes: Mistakes) -> None:
    wanted = rich_spec()
    wanted.parameters[0].shape[:] = [2**62, 0]
    driver = mistakes.ground.driver
    session_id = driver.create(wanted).status.session_id
    assert driver.get(session_id).spec.parameters[0].shape == [2**62, 0]
    driver.delete(session_id)
