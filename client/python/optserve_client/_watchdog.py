"""Deadlines for what the blocking grpc has none for: one step on a stream that lives on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deadline:
    """A moment after which something is cancelled."""

    __slots__ = ("at", "cancel", "expired")

    def __init__(self, at: float, cancel: Callable[[], object]) -> None:
        """Cancel with ``cancel`` at the monotonic time ``at``, in seconds."""
        self.at = at
        self.cancel = cancel
        self.expired = False


class Watchdog:
    """Cancels what takes too long, from one thread, which starts with the first deadline.

    A deadline that is met costs no switch of threads: the thread sleeps on, until the moment that
    it was waiting for has passed, and looks then whether there is still something to cancel.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deadlines: set[Deadline] = set()
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf
        self._closed = False

    @contextmanager
    def limit(self, timeout_s: float, cancel: Callable[[], object]) -> Iterator[Deadline]:
        """Call ``cancel`` if the block runs for longer than ``timeout_s``; the deadline tells."""
        deadline = Deadline(time.monotonic() + timeout_s, cancel)
        with self._condition:
            self._deadlines.add(deadline)
            if self._thread is None:
                # A daemon: it must not keep an interpreter alive whose client was never closed.
                self._thread = threading.Thread(
                    target=self._watch, name="optserve-deadlines", daemon=True
                )
                self._thread.start()
            elif deadline.at < self._wakes_at:
                self._condition.notify()
        try:
            yield deadline
        finally:
            with self._condition:
                self._deadlines.discard(deadline)

    def close(self) -> None:
        """End the thread. Deadlines that run are forgotten."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _watch(self) -> None:
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                for deadline in [due for due in self._deadlines if due.at <= now]:
                    self._deadlines.discard(deadline)
                    deadline.expired = True
                    deadline.cancel()
                self._wakes_at = min((left.at for left in self._deadlines), default=math.inf)
                wait_s = self._wakes_at - now
                self._condition.wait(None if wait_s == math.inf else wait_s)
