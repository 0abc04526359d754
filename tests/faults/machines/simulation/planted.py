"""Bugs that one could make, planted to see whether the simulation finds them.

Each takes the place of something that the server does right, for as long as a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

from torch import Tensor

from optserve_server.core import rounds, session
from optserve_server.core.creations import CreationRequest, Creations
from optserve_server.core.device import Device
from optserve_server.core.errors import RoundTimeoutError
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.round import Contribution, Round
from optserve_server.core.rounds import Rounds
from optserve_server.core.seats import Seats
from optserve_server.core.session import Session


def _forget_the_digest() -> AbstractContextManager[object]:
    """Take whatever comes with the number of a step that was made for its repeat."""
    return patch.object(Contribution, "check_digest", lambda _self: None)


def _do_not_keep_the_digest() -> AbstractContextManager[object]:
    """Apply a step, and note no digests beside it."""
    right = Session.step

    def step(
        self: Session, gradients: Sequence[Tensor | None], digests: Sequence[bytes]
    ) -> StepOutcome:
        return right(self, gradients, [b""] * len(digests))

    return patch.object(Session, "step", step)


def _apply_a_repeat() -> AbstractContextManager[object]:
    """Take a repeat of the last step for the next one."""
    right = Rounds.begin

    def begin(
        self: Rounds, worker: int, step: int, positions: Sequence[int] | None, digest: bytes = b""
    ) -> Contribution:
        return right(self, worker, max(step, self._round.step), positions, digest)

    return patch.object(Rounds, "begin", begin)


def _forget_who_waits() -> AbstractContextManager[object]:
    """Let a contribution that waits be written over by what the worker sends next."""
    return patch.object(Round, "has", lambda _self, _worker: False)


def _drop_what_timed_out() -> AbstractContextManager[object]:
    """Let a contribution go when its call has waited for too long."""
    right = Rounds.commit

    async def commit(self: Rounds, contribution: Contribution) -> tuple[StepOutcome, bool]:
        round_ = self._round
        try:
            return await right(self, contribution)
        except RoundTimeoutError:
            round_._gradients[contribution.worker] = None
            raise

    return patch.object(Rounds, "commit", commit)


def _add_in_another_order() -> AbstractContextManager[object]:
    """Add the workers' gradients from the last worker to the first."""
    right = Round.mean

    def mean(self: Round, device: Device) -> list[Tensor | None]:
        self._gradients.reverse()
        return right(self, device)

    return patch.object(Round, "mean", mean)


def _apply_what_is_not_finite() -> AbstractContextManager[object]:
    """Do not look whether gradients are finite: neither one worker's, nor their mean."""
    stack = ExitStack()
    for module in (rounds, session):
        stack.enter_context(patch.object(module, "check_finite", lambda *_arguments: None))
    return stack


def _share_a_seat() -> AbstractContextManager[object]:
    """Give a seat away without waiting until the call that has it has left."""

    async def vacate(self: Seats, worker: int, client_id: bytes) -> None:
        seat = self._held.get(worker)
        if client_id and seat and seat.client_id == client_id:
            del self._held[worker]

    return patch.object(Seats, "vacate", vacate)


def _make_a_session_for_each_request() -> AbstractContextManager[object]:
    """Do not know a request for a session again."""

    async def once(
        _self: Creations,
        _request: CreationRequest,
        create: Callable[[], Coroutine[Any, Any, str]],
    ) -> str:
        return await create()

    return patch.object(Creations, "once", once)


def _keep_the_memory() -> AbstractContextManager[object]:
    """Do not give back what was reserved for a session."""
    return patch.object(SessionRegistry, "_release", lambda _self, _tenant, _count: None)


PLANTED: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "forget the digest": _forget_the_digest,
    "do not keep the digest": _do_not_keep_the_digest,
    "apply a repeat": _apply_a_repeat,
    "forget who waits": _forget_who_waits,
    "drop what timed out": _drop_what_timed_out,
    "add in another order": _add_in_another_order,
    "apply what is not finite": _apply_what_is_not_finite,
    "share a seat": _share_a_seat,
    "make a session for each request": _make_a_session_for_each_request,
    "keep the memory": _keep_the_memory,
}
"""By what they do wrong."""
