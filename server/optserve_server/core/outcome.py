"""What a step did, and where a session stands after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step did."""

    step: int
    """Number of the step, from 1."""
    epochs: int
    """Epochs that had been ended."""
    rates: Mapping[str, float]
    """Learning rate that the step used, by group."""
    gradient_norm: float
    """Euclidean norm of the gradient that was applied, over all parameters."""
    digests: Sequence[bytes]
    """What identifies the content that each worker brought; empty where it sent no digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """Where a session stands between two steps."""

    steps: int
    """How many steps have been applied."""
    epochs: int
    """How many epochs have been ended."""
    rates: Mapping[str, float]
    """Learning rate that the next step will use, by group."""
    ready: bool
    """Whether every parameter has a value."""
    failed: bool
    """Whether a step failed half way."""
