"""How scenarios are written down.

What must come is added by generate.py, save where an author says it: above all, refusals.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensors import Json, given, of


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A list of acts."""

    name: str
    about: str
    acts: list[Json]
    cuts: list[Json] = field(default_factory=list)
    """Where the connection breaks: see cuts.py. Whether a step was answered before is not asked."""
    effective: bool = False
    """Whether what is in force in a session (its spec, every default filled in) must come too."""


def create(spec: Json, session: str = "a") -> Json:
    """Make a session."""
    return {"act": "create_session", "session": session, "spec": spec}


def refused_create(spec: Json, refused: Json) -> Json:
    """Try to make a session."""
    return create(spec, "none") | {"refused": refused}


def join(session: str = "a", worker: int = 0) -> Json:
    """Open a worker's stream."""
    return {"act": "join", "session": session, "worker": worker}


def step(
    number: int | None, gradients: list[Json], session: str = "a", via: str = "stream"
) -> Json:
    """Take a step as the only worker."""
    numbered = {} if number is None else {"step": number}
    act = {"act": "step", "session": session, **numbered, "gradients": gradients}
    return act if via == "stream" else act | {"via": via}


def contribution(worker: int, gradients: list[Json], via: str = "stream") -> Json:
    """Say what a worker brings to a round."""
    return {"worker": worker, "via": via, "gradients": gradients}


def round_of(number: int, *contributions: Json) -> Json:
    """Take a step as several workers, in this order of arrival."""
    return {"act": "round", "session": "a", "step": number, "contributions": list(contributions)}


def plain(act: str, session: str = "a", **keys: object) -> Json:
    """Write an act down."""
    return {"act": act, "session": session, **keys}


def evaluate(predictions: Json, targets: Json, session: str = "a", **keys: object) -> Json:
    """Evaluate a loss."""
    return plain("evaluate_loss", session, predictions=predictions, targets=targets, **keys)


def model(seed: int = 1) -> list[Json]:
    """Return a small linear layer."""
    return [given([3, 2], seed, name="weight"), given([3], seed + 1, name="bias")]


def gradients_of(seed: int) -> list[Json]:
    """Return gradients for model()."""
    return [given([3, 2], seed, name="weight"), given([3], seed + 5, name="bias")]


SMALL: Json = {"parameters": [of([1.0, -2.0], name="w")], "optimizer": {"sgd": {"lr": 0.5}}}
"""The smallest session that is worth the name."""


def with_loss(kind: str, **arguments: object) -> Json:
    """Return a small session with a loss."""
    return SMALL | {"loss": {kind: arguments}}


def refused(act: Json, reason: str, **facts: str) -> Json:
    """Say that an act must be refused, and why."""
    return act | {"refused": {"reason": reason, **facts}}


def one_by_one(*gradient: float) -> list[Json]:
    """Return a gradient for the only parameter of SMALL."""
    return [of(list(gradient), name="w")]
