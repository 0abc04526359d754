"""What came to nothing is tried again: when, for how long, and what is said of it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from optserve_client._effects import Operation, Pause
from optserve_client.config import Retry
from optserve_client.errors import (
    LimitError,
    OptserveError,
    StalledError,
    UnauthenticatedError,
    UnavailableError,
)

_Result = TypeVar("_Result")

_logger = logging.getLogger("optserve_client")


def may_pass(error: OptserveError) -> bool:
    """Return whether the same may work later: nothing answered, or the server asks to come back.

    A round that the other workers did not come to is none of these: how long a step waits for them
    is for the session to say. A call in the middle of which its token has ended may come again with
    another one; without, it is not let in, for good.
    """
    if isinstance(error, (LimitError, UnauthenticatedError)):
        return error.retry_after_s is not None
    return isinstance(error, (UnavailableError, StalledError))


class Outages:
    """The times in which a client's calls come to nothing, as its log tells of them."""

    def __init__(self, target: str, retry: Retry) -> None:
        """Bear with the server at ``target`` for as long as ``retry`` says."""
        self._target = target
        self._retry = retry
        self._since_s: float | None = None

    def persist(
        self,
        attempt: Callable[[], Operation[_Result]],
        again: Callable[[OptserveError], bool] = may_pass,
        reached_s: Callable[[], float | None] = lambda: None,
    ) -> Operation[_Result]:
        """Attempt an operation until it succeeds, or fails for good, or the time is up.

        Args:
            attempt: Returns the operation, which must be safe to repeat. Called for each attempt.
            again: Whether to make another one after this error.
            reached_s: Returns when the attempt that has failed had reached the server; None: it had
                not. From then to its failure there was no outage.

        Raises:
            OptserveError: What the last attempt came to.
        """
        began_s: float | None = None  # The outage: later by all the time that was none.
        backoff_s = self._retry.backoff_s
        while True:
            try:
                result = yield from attempt()
            except OptserveError as error:
                if not again(error):
                    raise
                now_s = time.monotonic()
                worked_s = now_s - (reached_s() or now_s)
                began_s = now_s if began_s is None else began_s + worked_s
                wait_s = (error.retry_after_s or 0.0) + self._jittered(backoff_s)
                if now_s + wait_s >= began_s + self._retry.give_up_after_s:
                    self._since_s = None
                    raise
                self._note(error)
            else:
                if began_s is not None:
                    self._note_end()
                return result
            yield Pause(seconds=wait_s)
            backoff_s = min(backoff_s * self._retry.backoff_factor, self._retry.backoff_max_s)

    def persist_until_gone(
        self, delete: Callable[[], Operation[_Result]], missing: type[OptserveError], gone: _Result
    ) -> Operation[_Result]:
        """Delete something; it has been deleted also if only the answer to that was lost.

        Args:
            delete: As ``attempt`` of persist().
            missing: Raised where there is no such thing.
            gone: The answer if that comes of a repeat.
        """
        attempts = 0

        def attempt() -> Operation[_Result]:
            nonlocal attempts
            attempts += 1
            try:
                return (yield from delete())
            except missing:
                if attempts == 1:
                    raise
                return gone

        return (yield from self.persist(attempt))

    def _jittered(self, seconds: float) -> float:
        return seconds * (1 - self._retry.jitter * random.random())  # noqa: S311 - No secret.

    def _note(self, error: OptserveError) -> None:
        """Say once that something has begun, however many calls it strikes."""
        if self._since_s is None:
            self._since_s = time.monotonic()
            _logger.warning(
                "%s: %s; trying again for up to %g s",
                *(self._target, error, self._retry.give_up_after_s),
            )

    def _note_end(self) -> None:
        if self._since_s is not None:
            elapsed_s, self._since_s = time.monotonic() - self._since_s, None
            _logger.info("%s: goes on after %.1f s", self._target, elapsed_s)
