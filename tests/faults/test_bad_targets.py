"""Predictions and targets that do not fit the loss, or each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from event_loop import TIMEOUT_S
from faults.ground import Mistakes
from google.protobuf.message import Message
from messages import message_of
from parity.cases import choose
from refusals import translated
from scenarios.models import spec
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import BCELoss, CrossEntropyLoss, KLDivLoss, L1Loss, MSELoss, NLLLoss
from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import Split
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.v1.tensor_pb2 import Tensor as TensorMessage

LOGITS, HALVES = torch.zeros(3, 4), torch.full((3, 4), 0.5)


def _classes(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _with(value: float) -> Tensor:
    tensor = HALVES.clone()
    tensor[1, 2] = value
    return tensor


OUTSIDE = "TARGET_OUT_OF_RANGE"
MISTAKES: Mapping[str, tuple[Message, Tensor, Tensor, str, str]] = {
    **{
        f"{type(loss).__name__}-{name}": (loss, LOGITS, targets, reason, field)
        for loss in (NLLLoss(), CrossEntropyLoss())
        for name, (targets, reason, field) in {
            "class-too-large": (_classes(0, 4, 1), OUTSIDE, "targets"),
            "class-negative": (_classes(0, -1, 1), OUTSIDE, "targets"),
            "class-absurd": (_classes(0, 2**63 - 1, 1), OUTSIDE, "targets"),
            "classes-of-another-type": (
                _classes(0, 1, 2, dtype=torch.int32),
                "DATA_TYPE_MISMATCH",
                "targets.data_type",
            ),
            "classes-of-bytes": (
                _classes(0, 1, 2, dtype=torch.uint8),
                "DATA_TYPE_MISMATCH",
                "targets.data_type",
            ),
            "classes-too-few": (_classes(0, 1), "SHAPE_MISMATCH", "targets.shape"),
            "classes-of-one-row": (_classes(0, 1, 2)[None], "SHAPE_MISMATCH", "targets.shape"),
        }.items()
    },
    "NLLLoss-shares": (NLLLoss(), LOGITS, HALVES, "DATA_TYPE_MISMATCH", "targets.data_type"),
    "CrossEntropyLoss-shares-of-another-shape": (
        CrossEntropyLoss(),
        LOGITS,
        HALVES[:2],
        "SHAPE_MISMATCH",
        "targets.shape",
    ),
    "CrossEntropyLoss-of-a-scalar": (
        CrossEntropyLoss(),
        torch.tensor(1.0),
        _classes(),
        "SHAPE_MISMATCH",
        "predictions.shape",
    ),
    "CrossEntropyLoss-of-no-class": (
        CrossEntropyLoss(),
        torch.zeros(3, 0),
        _classes(0, 0, 0),
        OUTSIDE,
        "targets",
    ),
    "CrossEntropyLoss-ignored-and-one-outside": (
        CrossEntropyLoss(ignore_index=7),
        LOGITS,
        _classes(7, 8, 0),
        OUTSIDE,
        "targets",
    ),
    "NLLLoss-of-more-classes-than-weights": (
        NLLLoss(weight=message_of(torch.ones(5))),
        LOGITS,
        _classes(0, 1, 2),
        "SHAPE_MISMATCH",
        "predictions.shape",
    ),
    "NLLLoss-of-another-type-than-its-weight": (
        NLLLoss(weight=message_of(torch.ones(4).double())),
        LOGITS,
        _classes(0, 1, 2),
        "DATA_TYPE_MISMATCH",
        "predictions.data_type",
    ),
    **{
        f"BCELoss-target-{value}": (BCELoss(), HALVES, _with(value), OUTSIDE, "targets")
        for value in (-0.1, 1.1, math.nan, math.inf)
    },
    **{
        f"BCELoss-prediction-{value}": (
            BCELoss(),
            _with(value),
            HALVES,
            "INVALID_FIELD",
            "predictions",
        )
        for value in (-0.1, 1.1, math.nan)
    },
    "BCELoss-weight-of-another-shape": (
        BCELoss(weight=message_of(torch.ones(5))),
        HALVES,
        HALVES,
        "SHAPE_MISMATCH",
        "predictions.shape",
    ),
    **{
        f"KLDivLoss-target-{value}": (KLDivLoss(), HALVES, _with(value), OUTSIDE, "targets")
        for value in (-0.1, math.nan)
    },
    **{
        f"{type(loss).__name__}-{name}": (loss, HALVES, targets, reason, field)
        for loss in (BCELoss(), KLDivLoss(), MSELoss(), L1Loss())
        for name, (targets, reason, field) in {
            "shape": (HALVES[:1], "SHAPE_MISMATCH", "targets.shape"),
            "scalar": (HALVES[0, 0], "SHAPE_MISMATCH", "targets.shape"),
            "type": (HALVES.double(), "DATA_TYPE_MISMATCH", "targets.data_type"),
            "integers": (HALVES.long(), "DATA_TYPE_MISMATCH", "targets.data_type"),
        }.items()
    },
    "MSELoss-predictions-of-integers": (
        MSELoss(),
        HALVES.long(),
        HALVES.long(),
        "DATA_TYPE_MISMATCH",
        "predictions.data_type",
    ),
}


@pytest.mark.parametrize(
    ("loss", "predictions", "targets", "reason", "field"), MISTAKES.values(), ids=MISTAKES
)
def test_what_does_not_fit_the_loss_is_refused_and_not_kept(
    mistakes: Mistakes,
    loss: Message,
    predictions: Tensor,
    targets: Tensor,
    reason: str,
    field: str,
) -> None:
    driver = mistakes.ground.driver
    request = pb.UpdateSessionRequest(session_id=mistakes.ground.session_id)
    request.loss.CopyFrom(choose(request.loss, loss))
    driver.update(request)
    with mistakes.refused(reason, field):
        driver.evaluate(
            mistakes.ground.session_id, predictions, targets, split=Split.SPLIT_TRAIN, gradient=True
        )


HEADER = TensorHeader(data_type=DataType.DATA_TYPE_FP32, shape=[3, 4])
WHOLE = TensorMessage(header=HEADER, data=bytes(48))
REQUESTS: Mapping[str, tuple[pb.EvaluateLossRequest, str, str]] = {
    "predictions-missing": (
        pb.EvaluateLossRequest(targets=WHOLE),
        "MISSING_FIELD",
        "predictions",
    ),
    "targets-missing": (
        pb.EvaluateLossRequest(predictions=WHOLE),
        "MISSING_FIELD",
        "targets",
    ),
    "predictions-of-too-few-bytes": (
        pb.EvaluateLossRequest(
            predictions=TensorMessage(header=HEADER, data=bytes(47)), targets=WHOLE
        ),
        "BYTE_COUNT_MISMATCH",
        "predictions.data",
    ),
    "targets-of-too-many-bytes": (
        pb.EvaluateLossRequest(
            predictions=WHOLE, targets=TensorMessage(header=HEADER, data=bytes(49))
        ),
        "BYTE_COUNT_MISMATCH",
        "targets.data",
    ),
    "targets-without-a-header": (
        pb.EvaluateLossRequest(predictions=WHOLE, targets=TensorMessage(data=bytes(48))),
        "INVALID_FIELD",
        "targets.header.data_type",
    ),
    "split-unknown": (
        pb.EvaluateLossRequest(predictions=WHOLE, targets=WHOLE, split=9),  # type: ignore[arg-type]
        "INVALID_FIELD",
        "split",
    ),
}


@pytest.mark.parametrize(("request_", "reason", "field"), REQUESTS.values(), ids=REQUESTS)
def test_an_evaluation_that_is_none_is_refused(
    mistakes: Mistakes, request_: pb.EvaluateLossRequest, reason: str, field: str
) -> None:
    wanted = spec(SGD(), loss=MSELoss())
    session_id = mistakes.ground.driver.create(wanted).status.session_id
    request_.session_id = session_id
    with mistakes.refused(reason, field), translated():
        mistakes.ground.driver.stub.EvaluateLoss(request_, timeout=TIMEOUT_S)
    mistakes.ground.driver.delete(session_id)


def test_targets_may_be_ignored_without_being_classes(mistakes: Mistakes) -> None:
    wanted = spec(SGD(), loss=CrossEntropyLoss())
    session_id = mistakes.ground.driver.create(wanted).status.session_id
    found = mistakes.ground.driver.evaluate(session_id, LOGITS, _classes(-100, 1, -100)).result
    assert found.loss == pytest.approx(math.log(4))
    mistakes.ground.driver.delete(session_id)
