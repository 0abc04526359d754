"""What the contract says beside its fields.

Constraints, and fields that this server does not know.
"""

from __future__ import annotations

import functools
import math

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from optserve.v1 import constraint_pb2
from optserve.v1.constraint_pb2 import Constraint
from optserve_server.core.errors import InvalidHyperparameterError, UnknownFieldError

# How far into a list an unknown field is looked for, to name it: that takes time for each element.
_LOOKED_AT_MAX = 1_000
# Nor among more bytes of them: Python makes objects of all, 0.4 s for each MiB.
_UNKNOWN_BYTES_MAX = 16 << 10


def kind_of(field: FieldDescriptor) -> Descriptor:
    """Return the message that a field of a `kind` oneof holds: ``Adam``."""
    message = field.message_type
    assert message is not None
    return message


@functools.cache
def constraint_of(field: FieldDescriptor) -> Constraint | None:
    """Return the constraint written beside a field, if there is one."""
    options = field.GetOptions()
    if not options.HasExtension(constraint_pb2.constraint):
        return None
    constraint: Constraint = options.Extensions[constraint_pb2.constraint]
    return constraint


def check_number(field: FieldDescriptor, value: float, path: str) -> None:
    """Make sure that a number is finite and keeps its field's constraint.

    Raises:
        InvalidHyperparameterError: It does not.
    """
    constraint = constraint_of(field) or Constraint()
    held = (
        math.isfinite(value)
        and not (constraint.HasField("at_least") and value < constraint.at_least)
        and not (constraint.HasField("above") and value <= constraint.above)
        and not (constraint.HasField("at_most") and value > constraint.at_most)
        and not (constraint.HasField("below") and value >= constraint.below)
    )
    if not held:
        expected = describe(constraint)
        raise InvalidHyperparameterError(
            f"{field.name} is {value:g}; it must be {expected}",
            field=path,
            expected=expected,
            actual=value,
        )


def check_count(field: FieldDescriptor, count: int, path: str) -> None:
    """Make sure that a repeated field has as many elements as its constraint asks for.

    Raises:
        InvalidHyperparameterError: It has not.
    """
    constraint = constraint_of(field)
    if constraint and constraint.count and count != constraint.count:
        raise InvalidHyperparameterError(
            f"{field.name} has {count} elements; it must have {constraint.count}",
            field=path,
            expected=f"{constraint.count} elements",
            actual=f"{count} elements",
        )


def describe(constraint: Constraint) -> str:
    """Say a constraint in words: ``finite, at least 0 and below 1``."""
    bounds = [
        f"{field.name.replace('_', ' ')} {value:g}"
        for field, value in constraint.ListFields()
        if field.name != "count"
    ]
    return ", ".join(["finite", " and ".join(bounds)] if bounds else ["finite"])


def check_known(message: Message) -> None:
    """Make sure that a message, and every message in it, has only fields that this server knows.

    protobuf would drop the others silently: a hyperparameter of a newer client would have no
    effect.

    Raises:
        UnknownFieldError: There is another one.
    """
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    unknown_bytes = message.ByteSize() - known.ByteSize()
    if not unknown_bytes:
        return
    name = message.DESCRIPTOR.name
    if unknown_bytes > _UNKNOWN_BYTES_MAX:
        raise UnknownFieldError(
            f"{name} has {unknown_bytes} bytes in fields that this server does not know",
            field="",
            expected=f"the fields of {name}",
            actual=f"{unknown_bytes} bytes in others",
        )
    path, name, number = _find_unknown(message, "") or ("", name, 0)
    raise UnknownFieldError(
        f"{name} has no field {number} on this server, which would drop it;"
        " the client may be newer",
        field=path,
        expected=f"the fields of {name}",
        actual=f"field {number}",
    )


def _find_unknown(message: Message, path: str) -> tuple[str, str, int] | None:
    """Return where the first unknown field is: the message's path and name, the field's number."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        return path, message.DESCRIPTOR.name, unknown[0].field_number
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        children = value[:_LOOKED_AT_MAX] if field.is_repeated else (value,)
        for i, child in enumerate(children):
            step = f"{field.name}[{i}]" if field.is_repeated else field.name
            found = _find_unknown(child, f"{path}.{step}" if path else step)
            if found:
                return found
    return None
