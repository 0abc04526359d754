"""A session's state, taken while others go on using it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Protocol

from optserve_server.core.errors import MemoryExhaustedError
from optserve_server.core.quotas import TenantBudget
from optserve_server.core.session import Session
from optserve_server.core.state import SessionState
from optserve_server.core.storage import Json
from optserve_server.core.work import Work


class Captured(Protocol):
    """Whoever serves a session, as far as its state is asked for."""

    session: Session
    work: Work

    def check_open(self) -> None:
        """Make sure that the session is still there.

        Raises:
            SessionDeletedError: It is not.
        """

    def about(self) -> Mapping[str, Json]:
        """Return what a snapshot says beside the session's state."""


@asynccontextmanager
async def captured(
    served: Captured, budget: TenantBudget, *, what: str
) -> AsyncIterator[SessionState]:
    """Have a session's state, as it is between two steps, for the time of a block.

    The session is held for the copy of its state, which is reserved. Where there is no room for a
    copy, it is held until the block ends.

    Args:
        served: Serves the session.
        budget: For the copy.
        what: What it is for: "a snapshot".

    Raises:
        SessionDeletedError: The session is not there any more, and may be empty by now.
        SessionFailedError: A step failed half way.
    """
    session, work = served.session, served.work
    with ExitStack() as reserved:
        async with AsyncExitStack() as held:
            await held.enter_async_context(work.lock.shared())
            served.check_open()
            copy = _has_room(session.byte_count, budget, what, reserved)
            state = await work.run(lambda: session.capture(copy=copy))
            if copy:
                await held.aclose()
            yield state


def _has_room(count: int, budget: TenantBudget, what: str, reserved: ExitStack) -> bool:
    """Reserve memory for a copy, if there is any."""
    try:
        reserved.enter_context(budget.reserved(count, what=what, field=""))
    except MemoryExhaustedError:
        return False
    return True
