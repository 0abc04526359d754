"""The last resort: a process that is to end ends in time, whatever hangs in it."""

from __future__ import annotations

import logging
import os
import threading

EXIT_STUCK = 4
"""Exit code of a process that was ended in the middle of its work."""

_LOGGER = logging.getLogger(__name__)


class LastResort:
    """Ends the process unless it has ended by itself.

    From a thread of its own: what hangs may be the event loop, or a thread that Python would wait
    for at its end.
    """

    def __init__(self) -> None:
        """Do nothing yet."""
        self._timer: threading.Timer | None = None

    def end_within(self, seconds: float) -> None:
        """End the process in so many seconds; what was said before counts no longer."""
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._end, [seconds])
        self._timer.daemon = True  # Or Python would wait for it.
        self._timer.start()

    def _end(self, seconds: float) -> None:
        threads = ", ".join(each.name for each in threading.enumerate() if each is not self._timer)
        _LOGGER.error(
            "work has not come to its end; leaving it",
            extra={"timeout_s": seconds, "threads": threads},
        )
        logging.shutdown()
        os._exit(EXIT_STUCK)
