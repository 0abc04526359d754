"""Files that are replaced while the server runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")
_Contents = tuple[bytes, ...]

LOOK_INTERVAL_S = 1.0  # How often files are read again, while somebody asks: they are small.


class UnusableFileError(Exception):
    """A file that the settings name cannot be used; the message says which, and why."""


class Watched(Generic[_T]):
    """What some files say together, read again when one of them has changed.

    Nobody can replace two files at once. What does not fit together, or cannot be used, is passed
    over with a warning, and what was there before stays in force. May be asked by any thread.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[_Contents], _T]) -> None:
        """Read the files.

        Args:
            paths: Where they are.
            parse: Makes sense of their contents, in the order of ``paths``; raises
                UnusableFileError where there is none.

        Raises:
            UnusableFileError: They cannot be read, or there is no sense in them.
        """
        self._paths = paths
        self._parse = parse
        self._lock = Lock()
        self._complaint = ""
        self._contents = self._read()
        self._value = parse(self._contents)
        self._look_s = time.monotonic() + LOOK_INTERVAL_S

    def current(self) -> _T:
        """Return what the files say; up to a second ago, and never what is half written."""
        if time.monotonic() >= self._look_s:  # Without the lock: streams ask with each message.
            with self._lock:
                if time.monotonic() >= self._look_s:
                    self._look()
                    self._look_s = time.monotonic() + LOOK_INTERVAL_S
        return self._value

    def _look(self) -> None:
        try:
            contents = self._read()
            if contents == self._contents:
                self._complaint = ""
                return
            value = self._parse(contents)
            if self._read() != contents:  # They are being written now: look again.
                return
        except UnusableFileError as error:
            self._complain(str(error))
            return
        self._contents, self._value, self._complaint = contents, value, ""
        _LOGGER.info("files read again", extra={"files": self._names()})

    def _complain(self, complaint: str) -> None:
        """Warn once of each trouble, and not at every look."""
        if complaint != self._complaint:
            self._complaint = complaint
            _LOGGER.warning(
                "changed files are not used; what they said before stays in force",
                extra={"files": self._names(), "cause": complaint},
            )

    def _read(self) -> _Contents:
        return tuple(map(read, self._paths))

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def read(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        UnusableFileError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFileError(f"{path} cannot be read: {error.strerror}") from error
