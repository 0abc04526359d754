"""Reasons of refusals, and the name under which they travel."""

from __future__ import annotations

from optserve.v1.error_pb2 import Reason

DOMAIN = "optserve"
"""``domain`` of every ErrorInfo."""

_PREFIX = "REASON_"
_REASONS = dict(Reason.items())


def reason_name(reason: Reason.ValueType) -> str:
    """Return the name of ``reason`` as ErrorInfo carries it: ``SHAPE_MISMATCH``."""
    return Reason.Name(reason).removeprefix(_PREFIX)


def reason_of(name: str) -> Reason.ValueType:
    """Return the reason that ErrorInfo calls ``name``.

    REASON_UNSPECIFIED if this version does not know it.
    """
    return _REASONS.get(_PREFIX + name, Reason.REASON_UNSPECIFIED)
