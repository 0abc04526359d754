"""Seats: for each worker the one call that sends for it, and who may take that call's place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from optserve_server.core.errors import (
    InvalidFieldError,
    SeatTakenOverError,
    WorkerBusyError,
)


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """The one call that sends for a worker."""

    worker: int
    task: asyncio.Task[Any]
    """The call."""
    client_id: bytes
    """Who called; empty: a client that did not say."""
    resting: bool = False
    """Whether the call waits between two steps, where it can be ended without harm."""
    taken_over: bool = False
    """Whether the same client's next call waits for this one to leave."""
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def check_held(self) -> None:
        """Make sure that the call has not lost its seat.

        Raises:
            SeatTakenOverError: It has.
        """
        if self.taken_over:
            raise SeatTakenOverError(
                f"the same client has opened another stream for worker {self.worker}, which goes on"
                " in the place of this one",
                field="worker",
                actual=self.worker,
            )


class Seats:
    """The seats of one session. Everything is called on the event loop."""

    def __init__(self, workers: int) -> None:
        """Have a seat for each of ``workers``."""
        self._workers = workers
        self._held: dict[int, Seat] = {}

    def __iter__(self) -> Iterator[Seat]:
        """Return the seats that are held."""
        return iter(self._held.values())

    def check_worker(self, worker: int) -> None:
        """Make sure that there is such a worker.

        Raises:
            InvalidFieldError: There is none.
        """
        if worker >= self._workers:
            raise InvalidFieldError(
                f"there is no worker {worker}; the session has {self._workers}, from 0",
                field="worker",
                expected=f"0 to {self._workers - 1}",
                actual=worker,
            )

    def take(self, worker: int, client_id: bytes) -> Seat:
        """Let the current task send for a worker, until it leaves.

        Raises:
            InvalidFieldError: There is no such worker.
            WorkerBusyError: Another call sends for it.
        """
        self.check_worker(worker)
        if worker in self._held:
            raise WorkerBusyError(
                f"another call is sending for worker {worker}", field="worker", actual=worker
            )
        seat = Seat(worker=worker, task=current_task(), client_id=client_id)
        self._held[worker] = seat
        return seat

    def leave(self, seat: Seat) -> None:
        """Give a seat back."""
        del self._held[seat.worker]
        seat.left.set()

    async def vacate(self, worker: int, client_id: bytes) -> None:
        """End the call that a client has for a worker, and wait until it has left.

        That takes as long as what is computed for the call at this moment, and does not depend on
        whether anybody reads. Of several who wait for one seat the last one will have it. A client
        without an id has nothing to end, and other clients' calls are left alone.
        """
        while client_id and (seat := self._held.get(worker)) and seat.client_id == client_id:
            if not seat.taken_over:  # A second cancellation would disturb it while it clears up.
                seat.taken_over = True
                seat.task.cancel()
            await seat.left.wait()


def current_task() -> asyncio.Task[Any]:
    """Return the task that calls."""
    task = asyncio.current_task()
    assert task is not None
    return task
