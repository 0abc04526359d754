"""Named places at which the server can be made to fail, to prove what it promises when it does.

Armed by ``OPTSERVE_FAILPOINTS``, for tests: ``journal-appended=kill@3`` kills the process when it
reaches that place for the third time. Unarmed, a place costs the look at one variable.

A name is that of the place; the action is one of

    kill     end the process at once, as kill -9 does
    full     fail as a full disk does: OSError(ENOSPC)
    broken   fail as a broken disk does: OSError(EIO)

and behind ``@`` stands at which time it happens, from 1; without it every time. Several are
separated by commas.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass

_ACTIONS = {"kill": 0, "full": errno.ENOSPC, "broken": errno.EIO}


@dataclass(slots=True, kw_only=True)
class _Failpoint:
    action: str
    at: int | None
    """At which time it happens. None: every time."""
    reached: int = 0


_armed: dict[str, _Failpoint] = {}
_lock = threading.Lock()


class FailpointError(ValueError):
    """The text does not name failpoints; the message says what is wrong with it."""


def arm(text: str) -> None:
    """Arm the failpoints that ``text`` names, and no others; none if it is empty.

    Raises:
        FailpointError: It is not written as it should be.
    """
    armed = dict(_read(each) for each in text.split(",") if each)
    _armed.clear()
    _armed.update(armed)


def armed() -> Iterable[str]:
    """Return the names of those that are armed."""
    return tuple(_armed)


def reach(name: str) -> None:
    """Fail here, if that is what was asked for.

    Raises:
        OSError: It was.
    """
    if _armed and name in _armed:
        _act(name)


def _act(name: str) -> None:
    with _lock:
        failpoint = _armed[name]
        failpoint.reached += 1
        if failpoint.at not in (None, failpoint.reached):
            return
    if failpoint.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    code = _ACTIONS[failpoint.action]
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")


def _read(text: str) -> tuple[str, _Failpoint]:
    name, _, rest = text.partition("=")
    action, separator, at = rest.partition("@")
    if not name or action not in _ACTIONS or (separator and not (at.isdecimal() and int(at) > 0)):
        raise FailpointError(
            f"{text!r} is no failpoint: NAME=ACTION or NAME=ACTION@TIME, where the action is one of"
            f" {', '.join(_ACTIONS)}"
        )
    return name, _Failpoint(action=action, at=int(at) if separator else None)
