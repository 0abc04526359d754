"""What changes a session: as values, as records of a journal, and once more.

Replaying the records of a session from one of its states gives the session that wrote them, bit for
bit on the same torch and device, because it is the session itself that makes the changes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from optserve_server.core.history import LossPoint
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.spec import SessionSpec
from optserve_server.core.spec_json import Read, decode_spec, encode_spec
from optserve_server.core.state import decode_point, encode_point
from optserve_server.core.storage import Json, Record, RecordKind

if TYPE_CHECKING:
    from optserve_server.core.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChange:
    """A step is applied."""

    outcome: StepOutcome
    """What it will have done."""
    gradients: Sequence[Tensor | None]
    """What is applied: the workers' mean, on the session's device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersChange:
    """Parameters get values."""

    values: Mapping[int, Tensor]
    """By position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochChange:
    """An epoch ends."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecChange:
    """Another spec is in force from now on."""

    spec: SessionSpec
    rates_set: Sequence[bool]
    """See Session.change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointChange:
    """The history gets a point."""

    point: LossPoint


Change: TypeAlias = StepChange | ParametersChange | EpochChange | SpecChange | PointChange


def to_record(change: Change, sequence: int, time_s: float) -> Record:
    """Return a change as a record; its tensors are the change's where they are on the CPU.

    Args:
        change: What is about to be done.
        sequence: Its number.
        time_s: When, in seconds since the epoch.
    """
    tensors: Sequence[tuple[int, Tensor]] = ()
    facts: dict[str, Json] = {"time_s": time_s}
    match change:
        case StepChange():
            kind = RecordKind.STEP
            facts |= {
                "step": change.outcome.step,
                "gradient_norm": change.outcome.gradient_norm,
                "digests": [digest.hex() for digest in change.outcome.digests],
            }
            tensors = [
                # copy on CUDA: device to host.
                (position, gradient.detach().cpu())
                for position, gradient in enumerate(change.gradients)
                if gradient is not None
            ]
        case ParametersChange():
            kind = RecordKind.PARAMETERS
            tensors = [
                (position, value.detach().cpu().contiguous())
                for position, value in change.values.items()
            ]
        case EpochChange():
            kind = RecordKind.EPOCH
            facts["epoch"] = change.epoch
        case SpecChange():
            kind = RecordKind.CHANGE
            spec, own = encode_spec(change.spec)
            facts |= {"spec": spec, "rates_set": list(change.rates_set)}
            tensors = list(enumerate(own))
        case PointChange():
            kind = RecordKind.LOSS_POINT
            facts["point"] = encode_point(change.point)
    return Record(sequence=sequence, kind=kind, facts=facts, tensors=tensors)


def replay(session: Session, record: Record) -> float:
    """Make the change again that a record tells of; return when it was made first.

    Raises:
        ValueError: The record does not follow on what the session has.
        OptserveError, LookupError, TypeError: It is no record of this session.
        Exception: What torch raised then, it raises again.
    """
    if record.sequence != session.sequence + 1:
        raise ValueError(f"record {record.sequence} cannot follow on change {session.sequence}")
    facts: Read = record.facts
    match record.kind:
        case RecordKind.STEP:
            gradients: list[Tensor | None] = [None] * len(session.spec.parameters)
            for position, gradient in record.tensors:
                gradients[position] = session.load(gradient)
            if facts["step"] != session.steps + 1:
                raise ValueError(f"step {facts['step']} cannot follow on step {session.steps}")
            digests = [bytes.fromhex(digest) for digest in facts["digests"]]
            session.step(gradients, digests, facts["gradient_norm"])
        case RecordKind.PARAMETERS:
            session.set_parameters(dict(record.tensors))
        case RecordKind.EPOCH:
            session.end_epoch(facts["epoch"])
        case RecordKind.CHANGE:
            spec = decode_spec(facts["spec"], [tensor for _, tensor in record.tensors])
            session.change(spec, facts["rates_set"])
        case RecordKind.LOSS_POINT:
            session.add_point(decode_point(facts["point"]))
    return float(facts["time_s"])
