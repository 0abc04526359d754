"""What the contract says beside its fields is what the server holds values to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2
from optserve.v1.constraint_pb2 import Constraint
from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.optimizer_service_pb2 import CreateSessionRequest
from optserve.v1.session_pb2 import ParameterGroup, SessionSpec
from optserve_server.core.errors import InvalidHyperparameterError, UnknownFieldError
from optserve_server.rpc.constraints import check_known, check_number, constraint_of, describe

CHOICES = (
    optimizer_pb2.Optimizer.DESCRIPTOR,
    scheduler_pb2.Scheduler.DESCRIPTOR,
    loss_pb2.Loss.DESCRIPTOR,
)


def _constrained() -> Iterator[tuple[FieldDescriptor, Constraint]]:
    for choice in CHOICES:
        for arm in choice.oneofs_by_name["kind"].fields:
            assert isinstance(arm.message_type, Descriptor)
            for field in arm.message_type.fields:
                if constraint := constraint_of(field):
                    yield field, constraint


CONSTRAINED = {field.full_name: (field, constraint) for field, constraint in _constrained()}


@pytest.mark.parametrize(("field", "constraint"), CONSTRAINED.values(), ids=CONSTRAINED)
def test_a_number_is_held_to_its_bounds(field: FieldDescriptor, constraint: Constraint) -> None:
    bounds = {each.name: value for each, value in constraint.ListFields() if each.name != "count"}
    assert bounds
    for name, bound in bounds.items():
        beyond = {
            "at_least": math.nextafter(bound, -math.inf),
            "at_most": math.nextafter(bound, math.inf),
        }.get(name, bound)  # The others are beyond themselves.
        with pytest.raises(InvalidHyperparameterError) as caught:
            check_number(field, beyond, "here")
        assert caught.value.field == "here"
        assert caught.value.expected == describe(constraint)
        if beyond != bound:
            check_number(field, bound, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_is_finite_also_where_there_is_no_constraint(value: float) -> None:
    fields = optimizer_pb2.SGD.DESCRIPTOR.fields_by_name
    assert constraint_of(fields["dampening"]) is None
    for name in ("dampening", "lr"):
        with pytest.raises(InvalidHyperparameterError):
            check_number(fields[name], value, "here")


def test_a_constraint_is_said_in_words() -> None:
    assert describe(Constraint()) == "finite"
    assert describe(Constraint(at_least=0, below=1)) == "finite, at least 0 and below 1"


UNKNOWN = b"\xc0\x3e\x07"  # Field 1000, a varint.


@pytest.mark.parametrize("wire_type", [UNKNOWN, b"\xc2\x3e\x01a", b"\xc1\x3e12345678"])
def test_a_field_that_is_not_known_is_found_wherever_it_is(wire_type: bytes) -> None:
    adam = Adam(lr=1).SerializeToString() + wire_type
    optimizer = Optimizer(adam=Adam.FromString(adam))
    group = ParameterGroup(name="a", overrides=optimizer)
    request = CreateSessionRequest(spec=SessionSpec(groups=[ParameterGroup(), group]))
    with pytest.raises(UnknownFieldError) as caught:
        check_known(request)
    assert caught.value.field == "spec.groups[1].overrides.adam"
    assert caught.value.actual == "field 1000"
    with pytest.raises(UnknownFieldError):
        check_known(CreateSessionRequest.FromString(wire_type))
    request.spec.groups[1].overrides.adam.DiscardUnknownFields()
    check_known(request)


def test_a_message_full_of_unknown_fields_is_refused_without_a_look_at_each() -> None:
    unknown = b"\xc0\x3e\x01" * 1_000_000  # Field 1000. To look at them took a second.
    with pytest.raises(UnknownFieldError) as caught:
        check_known(CreateSessionRequest.FromString(unknown))
    assert caught.value.actual == f"{len(unknown)} bytes in others"
