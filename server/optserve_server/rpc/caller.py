"""Who calls, and for how long that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _never() -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, as was found when the call began."""

    tenant: str
    """Whose call it is."""
    ended: Callable[[], str] = _never
    """Returns why what the caller has shown is accepted no more; nothing as long as it is. It is
    asked at every message of a stream, and must be quick."""
