"""Where sessions survive, and where the disk's work is done: off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from optserve_server.core.storage import Origin, Storage
from optserve_server.core.work import to_its_end

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persistence:
    """A place for sessions that survive."""

    storage: Storage
    executor: Executor
    """Threads that wait for the disk, beside those that compute."""
    origin: Origin
    """What computes here."""
    replay_foreign: bool = False
    """Whether to replay journals that something else has written."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` in a thread, to its end even if the call that asked for it is cancelled."""
        loop = asyncio.get_running_loop()
        return await to_its_end(loop.run_in_executor(self.executor, work))
