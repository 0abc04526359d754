"""Where a session stands: all that a listing says of it, whether it is in memory or on disk."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from optserve_server.core.events import SessionOpened
from optserve_server.core.outcome import SessionView
from optserve_server.core.spec import SessionSpec
from optserve_server.core.spec_json import Read
from optserve_server.core.storage import Json


class State(enum.StrEnum):
    """What a session can do."""

    AWAITING_PARAMETERS = "awaiting_parameters"
    READY = "ready"
    FAILED = "failed"
    """A step failed half way."""
    PARKED = "parked"
    """It lies on disk only, and comes back when it is called."""
    DAMAGED = "damaged"
    """What is on disk of it is not what was written there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a session stands; the contract's SessionStatus says what each field means."""

    session_id: str
    display_name: str
    state: State
    steps: int
    epochs: int
    rates: Mapping[str, float]
    optimizer: str
    workers: int
    parameter_count: int
    reserved_bytes: int
    device: str
    created_s: float
    stepped_s: float | None
    durable_steps: int


class Listed(Protocol):
    """A session, wherever it is."""

    opened: SessionOpened
    """What it was opened with."""

    @property
    def session_id(self) -> str:
        """The session's id."""

    def standing(self) -> Standing:
        """Return where it stands."""


def live_standing(
    spec: SessionSpec,
    view: SessionView,
    *,
    session_id: str,
    reserved_bytes: int,
    device: str,
    created_s: float,
    stepped_s: float | None,
    durable_steps: int,
) -> Standing:
    """Return where a session in memory stands, that ``spec`` is in force for."""
    state = State.READY if view.ready else State.AWAITING_PARAMETERS
    return Standing(
        session_id=session_id,
        display_name=spec.display_name,
        state=State.FAILED if view.failed else state,
        steps=view.steps,
        epochs=view.epochs,
        rates=view.rates,
        optimizer=spec.optimizer.kind,
        workers=spec.workers,
        parameter_count=sum(parameter.element_count for parameter in spec.parameters),
        reserved_bytes=reserved_bytes,
        device=device,
        created_s=created_s,
        stepped_s=stepped_s,
        durable_steps=durable_steps,
    )


def encode_standing(standing: Standing) -> Mapping[str, Json]:
    """Return it as JSON."""
    return {
        "display_name": standing.display_name,
        "steps": standing.steps,
        "epochs": standing.epochs,
        "rates": dict(standing.rates),
        "optimizer": standing.optimizer,
        "workers": standing.workers,
        "parameter_count": standing.parameter_count,
        "reserved_bytes": standing.reserved_bytes,
        "device": standing.device,
        "created_s": standing.created_s,
        "stepped_s": standing.stepped_s,
    }


def decode_standing(facts: Read, session_id: str, state: State) -> Standing:
    """Return what encode_standing() was given of a session that lies on disk.

    Raises:
        LookupError, TypeError, ValueError: It was not encode_standing() that made it.
    """
    stepped_s = facts["stepped_s"]
    return Standing(
        session_id=session_id,
        display_name=str(facts["display_name"]),
        state=state,
        steps=int(facts["steps"]),
        epochs=int(facts["epochs"]),
        rates={str(group): float(rate) for group, rate in facts["rates"].items()},
        optimizer=str(facts["optimizer"]),
        workers=int(facts["workers"]),
        parameter_count=int(facts["parameter_count"]),
        reserved_bytes=int(facts["reserved_bytes"]),
        device=str(facts["device"]),
        created_s=float(facts["created_s"]),
        stepped_s=None if stepped_s is None else float(stepped_s),
        durable_steps=int(facts["steps"]),
    )
