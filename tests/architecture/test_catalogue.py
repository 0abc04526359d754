"""The catalogue's messages carry torch's arguments: all of them, and no others."""

from __future__ import annotations

import inspect

import pytest
import torch
from google.protobuf.descriptor import Descriptor
from sources import ROOT

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2

CATALOGUE = {
    torch.optim: optimizer_pb2.Optimizer.DESCRIPTOR,
    torch.optim.lr_scheduler: scheduler_pb2.Scheduler.DESCRIPTOR,
    torch.nn: loss_pb2.Loss.DESCRIPTOR,
}

NOT_OFFERED = {"capturable", "differentiable", "last_epoch", "reduce", "size_average"}
"""Each .proto file says why; so does server/docs/decisions/0001-*.md."""

GIVEN_OTHERWISE = {"params", "optimizer"}  # The session has its parameters, and its optimizer.

OURS = {"LambdaLR": {"group_lr_lambdas"}}  # What torch takes as a list in the place of lr_lambda.

ENTRIES = [
    pytest.param(getattr(module, field.message_type.name), field.message_type, id=field.name)
    for module, descriptor in CATALOGUE.items()
    for field in descriptor.oneofs_by_name["kind"].fields
    if field.message_type is not None
]


@pytest.mark.parametrize(("torch_class", "message"), ENTRIES)
def test_message_has_torchs_arguments(torch_class: type, message: Descriptor) -> None:
    torchs = set(inspect.signature(torch_class).parameters) - NOT_OFFERED - GIVEN_OTHERWISE
    ours = {field.name for field in message.fields} - OURS.get(message.name, set())
    assert ours == torchs


@pytest.mark.parametrize("argument", sorted(NOT_OFFERED))
def test_what_is_not_offered_is_documented(argument: str) -> None:
    contract = "".join(path.read_text() for path in ROOT.glob("protos/optserve/v1/*.proto"))
    (decision,) = ROOT.glob("server/docs/decisions/0001-*.md")
    assert f"`{argument}`" in contract
    assert f"`{argument}`" in decision.read_text(encoding="utf-8")


def test_every_kind_is_an_entry() -> None:
    assert len(ENTRIES) == sum(
        len(descriptor.fields_by_name) - (descriptor.name == "Scheduler")  # It has `unit` as well.
        for descriptor in CATALOGUE.values()
    )
