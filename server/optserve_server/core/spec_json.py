"""A session's spec as JSON, with the tensors among its arguments beside it, and back.

What is written here is read by later versions: see VERSION.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from optserve_server.core.spec import (
    Choice,
    Durability,
    DurabilityMode,
    Encoding,
    GroupSpec,
    ScheduleUnit,
    SessionSpec,
    Value,
    Wire,
)
from optserve_server.core.storage import Json
from optserve_server.core.tensors import DTYPES, TensorSpec, dtype_name

VERSION = 1
"""Of the form. A later version adds what an older reader must not pass over by a new number."""

Read: TypeAlias = Any
"""JSON that was read: what it holds shows as it is taken apart."""

_TENSOR = "tensor"  # Key of what stands for a tensor: its number.


class SpecVersionError(ValueError):
    """A newer server wrote it."""


def encode_spec(spec: SessionSpec) -> tuple[Mapping[str, Json], Sequence[Tensor]]:
    """Return a spec as facts, and the tensors that they name by their numbers."""
    tensors: list[Tensor] = []
    durability = spec.durability
    facts: dict[str, Json] = {
        "version": VERSION,
        "display_name": spec.display_name,
        "parameters": [
            {"name": each.name, "dtype": dtype_name(each.dtype), "shape": list(each.shape)}
            for each in spec.parameters
        ],
        "optimizer": _choice(spec.optimizer, tensors),
        "groups": [
            {
                "name": group.name,
                "parameters": list(group.parameters),
                "hyperparameters": _values(group.hyperparameters, tensors),
            }
            for group in spec.groups
        ],
        "scheduler": _choice(spec.scheduler, tensors) if spec.scheduler else None,
        "schedule_unit": spec.schedule_unit,
        "loss": _choice(spec.loss, tensors) if spec.loss else None,
        "workers": spec.workers,
        "allow_non_finite": spec.allow_non_finite,
        "loss_points_max": spec.loss_points_max,
        "round_timeout_s": spec.round_timeout_s,
        "wire": {"gradients": spec.wire.gradients, "parameters": spec.wire.parameters},
        "durability": {
            "mode": durability.mode,
            "snapshot_steps": durability.snapshot_steps,
            "snapshot_s": durability.snapshot_s,
            "fsync": durability.fsync,
        },
    }
    return facts, tensors


def decode_spec(facts: Read, tensors: Sequence[Tensor]) -> SessionSpec:
    """Return the spec that encode_spec() was given.

    Args:
        facts: As encode_spec() made them; what they hold besides is passed over.
        tensors: By the numbers that the facts name.

    Raises:
        SpecVersionError: A newer server wrote them.
        LookupError, TypeError, ValueError: It was not encode_spec() that made them.
    """
    if facts["version"] > VERSION:
        raise SpecVersionError(f"a spec of form {facts['version']}; this server knows {VERSION}")
    scheduler, loss = facts["scheduler"], facts["loss"]
    wire, durability = facts["wire"], facts["durability"]
    return SessionSpec(
        display_name=str(facts["display_name"]),
        parameters=tuple(
            TensorSpec(
                name=str(each["name"]), dtype=DTYPES[each["dtype"]], shape=tuple(each["shape"])
            )
            for each in facts["parameters"]
        ),
        optimizer=_read_choice(facts["optimizer"], tensors),
        groups=tuple(
            GroupSpec(
                name=str(group["name"]),
                parameters=tuple(group["parameters"]),
                hyperparameters=_read_values(group["hyperparameters"], tensors),
            )
            for group in facts["groups"]
        ),
        scheduler=_read_choice(scheduler, tensors) if scheduler else None,
        schedule_unit=ScheduleUnit(facts["schedule_unit"]),
        loss=_read_choice(loss, tensors) if loss else None,
        workers=int(facts["workers"]),
        allow_non_finite=bool(facts["allow_non_finite"]),
        loss_points_max=int(facts["loss_points_max"]),
        round_timeout_s=float(facts["round_timeout_s"]),
        wire=Wire(gradients=Encoding(wire["gradients"]), parameters=Encoding(wire["parameters"])),
        durability=Durability(
            mode=DurabilityMode(durability["mode"]),
            snapshot_steps=int(durability["snapshot_steps"]),
            snapshot_s=float(durability["snapshot_s"]),
            fsync=bool(durability["fsync"]),
        ),
    )


def encode_value(value: Value | None, tensors: list[Tensor]) -> Json:
    """Return a value as JSON; a tensor goes to the end of ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: len(tensors) - 1}
    return list(value) if isinstance(value, tuple) else value


def decode_value(value: Read, tensors: Sequence[Tensor]) -> Read:
    """Return the value that encode_value() was given."""
    if isinstance(value, Mapping):
        return tensors[value[_TENSOR]]
    return tuple(value) if isinstance(value, list) else value


def _choice(choice: Choice, tensors: list[Tensor]) -> Json:
    return {"kind": choice.kind, "arguments": _values(choice.arguments, tensors)}


def _values(values: Mapping[str, Value], tensors: list[Tensor]) -> Json:
    return {name: encode_value(value, tensors) for name, value in values.items()}


def _read_choice(facts: Read, tensors: Sequence[Tensor]) -> Choice:
    return Choice(kind=str(facts["kind"]), arguments=_read_values(facts["arguments"], tensors))


def _read_values(facts: Read, tensors: Sequence[Tensor]) -> dict[str, Read]:
    return {name: decode_value(value, tensors) for name, value in facts.items()}
