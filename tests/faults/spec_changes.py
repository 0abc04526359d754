"""Ways to spoil a session's spec."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message
from parity.cases import choose

from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.scheduler_pb2 import Scheduler
from optserve.v1.session_pb2 import ParameterGroup, SessionSpec
from optserve.v1.tensor_pb2 import DataType, Encoding, TensorHeader

Change = Callable[[SessionSpec], object]
FP32 = DataType.DATA_TYPE_FP32


def named(name: str) -> Change:
    """Give the first parameter another name."""
    return lambda spec: setattr(spec.parameters[0], "name", name)


def typed(data_type: int) -> Change:
    """Give the first parameter another data type."""
    return lambda spec: setattr(spec.parameters[0], "data_type", data_type)


def encoded(data_type: int) -> Change:
    """Give the first parameter another data type, and let parameters travel in BF16."""

    def change(spec: SessionSpec) -> None:
        typed(data_type)(spec)
        spec.wire.parameters = Encoding.ENCODING_BF16

    return change


def shaped(*shape: int) -> Change:
    """Give the first parameter another shape."""

    def change(spec: SessionSpec) -> None:
        spec.parameters[0].shape[:] = shape

    return change


def optimized(kind: Message) -> Change:
    """Choose another optimizer, for one group."""

    def change(spec: SessionSpec) -> None:
        del spec.groups[:]
        spec.optimizer.CopyFrom(choose(Optimizer(), kind))

    return change


def scheduled(kind: Message | None, unit: int = 1) -> Change:
    """Choose another scheduler."""

    def change(spec: SessionSpec) -> None:
        spec.scheduler.CopyFrom(Scheduler() if kind is None else choose(Scheduler(), kind))
        spec.scheduler.unit = unit  # type: ignore[assignment]

    return change


def lost(kind: Message | None) -> Change:
    """Choose another loss."""
    loss = Loss() if kind is None else choose(Loss(), kind)
    return lambda spec: spec.loss.CopyFrom(loss)


def grouped(*groups: ParameterGroup) -> Change:
    """Make other groups."""

    def change(spec: SessionSpec) -> None:
        del spec.groups[:]
        spec.groups.extend(groups)

    return change


def group(name: str, *parameters: str, overrides: Message | None = None) -> ParameterGroup:
    """Return a group, as the contract has it."""
    own = choose(Optimizer(), overrides) if overrides is not None else None
    return ParameterGroup(name=name, parameters=parameters, overrides=own)


def many_parameters(count: int) -> Change:
    """Have so many parameters instead."""

    def change(spec: SessionSpec) -> None:
        del spec.parameters[:], spec.groups[:]
        spec.parameters.extend(
            TensorHeader(name=str(i), data_type=FP32, shape=[1]) for i in range(count)
        )

    return change


def long_names(spec: SessionSpec) -> None:
    """Have names within their limit that do not fit, all of them twice, into the answer."""
    many_parameters(9_800)(spec)
    for header in spec.parameters:
        header.name = header.name.rjust(250, "x")
