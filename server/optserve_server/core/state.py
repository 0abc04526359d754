"""All of a session that its next step depends on, and all that it answers with: as values.

A session that is restored from its state goes on as if nothing had happened, bit for bit. The state
as a Snapshot is facts in JSON and tensors by name, which storage can keep; later versions read what
earlier ones wrote: see VERSION.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optserve_server.core.history import HistoryState, LossPoint
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.spec import SessionSpec, Split, Value
from optserve_server.core.spec_json import (
    Read,
    decode_spec,
    decode_value,
    encode_spec,
    encode_value,
)
from optserve_server.core.storage import Json, Snapshot

VERSION = 1
"""Of the facts. A later version adds what an older reader must not pass over by a new number."""


class StateVersionError(ValueError):
    """A newer server wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """A session between two changes. Its tensors are on the CPU and contiguous."""

    spec: SessionSpec
    sequence: int
    """Number of the last change."""
    parameters: Mapping[int, Tensor]
    """By position; those that have a value."""
    optimizer_state: Mapping[int, Mapping[str, Value]]
    """What torch keeps for each parameter that has stepped, by its place among the groups."""
    optimizer_groups: Sequence[Mapping[str, Value | None]]
    """What torch has in force for each group."""
    schedule: Mapping[str, Value | None] | None
    """Where torch's scheduler stands. None: there is none."""
    epochs: int
    epoch_steps: int
    """Steps of the epoch that is going on."""
    last_outcome: StepOutcome | None
    history: HistoryState

    @property
    def steps(self) -> int:
        """How many steps have been applied."""
        return self.last_outcome.step if self.last_outcome else 0


def to_snapshot(state: SessionState, about: Mapping[str, Json]) -> Snapshot:
    """Return a state as what storage keeps; the tensors are the state's.

    Args:
        state: What to keep.
        about: Facts of whoever serves the session, which state_of() passes over.
    """
    spec, spec_tensors = encode_spec(state.spec)
    tensors = {f"spec.{i}": tensor for i, tensor in enumerate(spec_tensors)}
    tensors |= {f"parameters.{i}": tensor for i, tensor in state.parameters.items()}
    numbers: list[Json] = []  # What torch keeps for a parameter beside tensors.
    for position, values in state.optimizer_state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{position}.{name}"] = value
            else:
                numbers.append([position, name, encode_value(value, [])])
    facts: dict[str, Json] = {
        "version": VERSION,
        "spec": spec,
        "optimizer_numbers": numbers,
        "optimizer_groups": [_encode_values(group) for group in state.optimizer_groups],
        "schedule": None if state.schedule is None else _encode_values(state.schedule),
        "epochs": state.epochs,
        "epoch_steps": state.epoch_steps,
        "last_outcome": _encode_outcome(state.last_outcome) if state.last_outcome else None,
        "history": {
            "counts": {str(split): count for split, count in state.history.counts.items()},
            "points": [encode_point(point) for point in state.history.points],
        },
        "about": about,
    }
    return Snapshot(sequence=state.sequence, facts=facts, tensors=tensors)


def to_state(snapshot: Snapshot) -> SessionState:
    """Return the state that to_snapshot() was given.

    Raises:
        StateVersionError, SpecVersionError: A newer server wrote it.
        LookupError, TypeError, ValueError: It was not to_snapshot() that made it.
    """
    facts: Read = snapshot.facts
    if facts["version"] > VERSION:
        raise StateVersionError(f"a state of form {facts['version']}; this server knows {VERSION}")
    spec_tensors = _numbered(snapshot.tensors, "spec.")
    parameters: dict[int, Tensor] = {}
    optimizer_state: dict[int, dict[str, Value]] = {}
    for key, tensor in snapshot.tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "parameters":
            parameters[int(rest)] = tensor
        elif kind == "optimizer":
            position, _, name = rest.partition(".")
            optimizer_state.setdefault(int(position), {})[name] = tensor
    for position, name, value in facts["optimizer_numbers"]:
        optimizer_state.setdefault(position, {})[name] = decode_value(value, [])
    history = facts["history"]
    return SessionState(
        spec=decode_spec(facts["spec"], spec_tensors),
        sequence=snapshot.sequence,
        parameters=parameters,
        optimizer_state=optimizer_state,
        optimizer_groups=[_decode_values(group) for group in facts["optimizer_groups"]],
        schedule=None if facts["schedule"] is None else _decode_values(facts["schedule"]),
        epochs=int(facts["epochs"]),
        epoch_steps=int(facts["epoch_steps"]),
        last_outcome=_decode_outcome(facts["last_outcome"]) if facts["last_outcome"] else None,
        history=HistoryState(
            counts={Split(split): int(count) for split, count in history["counts"].items()},
            points=[decode_point(each) for each in history["points"]],
        ),
    )


def encode_point(point: LossPoint) -> Json:
    """Return a point of a history as JSON."""
    return [
        point.sequence,
        point.split,
        point.steps,
        point.epochs,
        point.loss,
        point.accuracy,
        point.time_s,
    ]


def decode_point(facts: Read) -> LossPoint:
    """Return the point that encode_point() was given."""
    sequence, split, steps, epochs, loss, accuracy, time_s = facts
    return LossPoint(
        sequence=int(sequence),
        split=Split(split),
        steps=int(steps),
        epochs=int(epochs),
        loss=float(loss),
        accuracy=None if accuracy is None else float(accuracy),
        time_s=float(time_s),
    )


def _encode_outcome(outcome: StepOutcome) -> Json:
    return {
        "step": outcome.step,
        "epochs": outcome.epochs,
        "rates": dict(outcome.rates),
        "gradient_norm": outcome.gradient_norm,
        "digests": [digest.hex() for digest in outcome.digests],
    }


def _decode_outcome(facts: Read) -> StepOutcome:
    return StepOutcome(
        step=int(facts["step"]),
        epochs=int(facts["epochs"]),
        rates={str(group): float(rate) for group, rate in facts["rates"].items()},
        gradient_norm=float(facts["gradient_norm"]),
        digests=[bytes.fromhex(digest) for digest in facts["digests"]],
    )


def _encode_values(values: Mapping[str, Value | None]) -> Json:
    return {name: encode_value(value, []) for name, value in values.items()}


def _decode_values(facts: Read) -> dict[str, Read]:
    return {name: decode_value(value, []) for name, value in facts.items()}


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """Return the tensors that are named by a prefix and their number, in the order of these."""
    count = sum(name.startswith(prefix) for name in tensors)
    return [tensors[f"{prefix}{i}"] for i in range(count)]
