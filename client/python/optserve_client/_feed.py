"""Gradients on their way from whoever computes them to whoever sends them, one by one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from optserve.wire import Chunk, Part, Source, split_parts


class FeedClosedError(Exception):
    """No more gradients will come: the step that was begun with them must not be ended."""


class _Ready(NamedTuple):
    position: int
    gradient: memoryview
    wait: Callable[[], object]


class Feed:
    """The gradients of one step, in the order in which they become ready.

    Filled by any threads, which never wait; emptied by one other, which does.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Expect one gradient for each of ``names``: of parameters, in the session's order."""
        self.names = names
        self._queue: queue.SimpleQueue[_Ready | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._given: dict[int, _Ready] = {}
        self._ended = False
        self._closed = False

    def put(self, position: int, gradient: memoryview, wait: Callable[[], object]) -> None:
        """Pass on a gradient.

        Args:
            position: Of its parameter among the names.
            gradient: Its bytes. Must not change until the step is over; what has changed must be
                given up.
            wait: Returns once the bytes are there. Called by the thread that reads them.
        """
        with self._lock:
            if not self._closed:
                self._given[position] = ready = _Ready(position, gradient, wait)
                self._queue.put(ready)

    def end(self) -> bool:
        """Let the step be ended: every gradient has been passed on, and is as it was then.

        Returns:
            Whether there is still a step to end.
        """
        with self._lock:
            self._ended = not self._closed
        self._queue.put(None)
        return self._ended

    def close(self) -> None:
        """Give the step up, unless it has been ended; release who waits. May be called again."""
        with self._lock:
            self._closed = True
            self._given = {}
        with suppress(queue.Empty):  # What nobody will send need not be kept.
            while True:
                self._queue.get_nowait()
        self._queue.put(None)

    @property
    def is_ended(self) -> bool:
        """Whether the step may be ended, so that all of its gradients may be sent at once."""
        with self._lock:
            return self._ended and not self._closed

    def all(self) -> list[memoryview]:
        """Return the bytes of all gradients of a step that is ended, in the order of the names."""
        with self._lock:
            given = [self._given[position] for position in range(len(self.names))]
        for ready in given:
            ready.wait()
        return [ready.gradient for ready in given]

    def settle(self) -> bool:
        """Return whether the step is ended, and so may be sent again; if not, give it up."""
        if not self.is_ended:
            with self._lock:
                self._closed |= not self._ended
        return self.is_ended

    def gradients(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the position and the bytes of each gradient once it is there.

        Raises:
            FeedClosedError: Not all of them will come.
        """
        for _ in self.names:
            ready = self._next()
            assert ready is not None, "ended before its last gradient"
            ready.wait()
            yield ready.position, ready.gradient

    def wait_for_end(self) -> None:
        """Wait, after the last gradient, until the step may be ended.

        Raises:
            FeedClosedError: It may not.
        """
        self._next()

    def chunks(
        self, source_of: Callable[[str, memoryview], Source], chunk_bytes: int
    ) -> Iterator[list[Chunk]]:
        """Yield the chunks of one message after the other; they end when the step may be ended.

        Args:
            source_of: Returns what is sent of a parameter's gradient.
            chunk_bytes: Most tensor bytes in one message.

        Raises:
            FeedClosedError: It may not.
        """
        parts = (
            Part(position, 0, source_of(self.names[position], gradient))
            for position, gradient in self.gradients()
        )
        yield from split_parts(parts, chunk_bytes)
        self.wait_for_end()

    def _next(self) -> _Ready | None:
        ready = self._queue.get()
        if self._closed:
            raise FeedClosedError
        return ready
