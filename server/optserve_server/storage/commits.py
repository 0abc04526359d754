"""Group commit: one wait for the disk makes the records of many sessions durable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from optserve_server.core.storage import StorageFailedError
from optserve_server.storage.disk import Disk, File

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsynced:
    """What a journal has written, and not on stable storage yet."""

    sequence: int
    """The last record in it."""
    name: str
    """What to call the journal."""
    files: Sequence[File]
    sealed: Sequence[File]
    """Those of them that nothing is appended to any more."""
    directory: str | None
    """Where there are new names. None: nowhere."""


class Committing(Protocol):
    """A journal, to a group commit."""

    def begin_sync(self) -> Unsynced:
        """Return what is to be synced; the files stay open until end_sync()."""

    def end_sync(self, synced: Unsynced, error: StorageFailedError | None) -> None:
        """Take note that it was synced, or that nobody knows."""


class Commits:
    """Syncs what journals ask it to, all that wait at once, in a thread of its own.

    While the disk is busy with some, the next ones gather: the more sessions, the larger the group.
    """

    def __init__(self, disk: Disk, *, threaded: bool = True) -> None:
        """Sync files of ``disk``; if not ``threaded``, in the caller's thread, before returning."""
        self._disk = disk
        self._waiting: list[tuple[Committing, Future[None]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
            self._thread.start()

    def submit(self, journal: Committing) -> Future[None]:
        """Sync what the journal has written until now.

        Returns:
            Done when it was. Raises StorageFailedError if nobody knows.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # Whoever stops waiting for it does not stop the disk.
        if self._thread is None:
            self._sync([(journal, done)])
            return done
        with self._changed:
            assert not self._closed, "stores are closed before their storage"
            self._waiting.append((journal, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Sync what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                group, self._waiting = self._waiting, []
            if not group:
                return
            self._sync(group)

    def _sync(self, group: Sequence[tuple[Committing, Future[None]]]) -> None:
        journals = dict.fromkeys(journal for journal, _ in group)  # Each once, in their order.
        unsynced = {journal: journal.begin_sync() for journal in journals}
        try:
            errors = self._sync_all(unsynced)
        except Exception as fault:
            # Whatever it was, somebody waits for an answer, and this thread is everybody's.
            _logger.exception("a commit has failed")
            unknown = StorageFailedError(f"{type(fault).__name__} in a commit")
            errors = dict.fromkeys(unsynced, unknown)
        for journal, what in unsynced.items():
            journal.end_sync(what, errors.get(journal))
        for journal, done in group:
            error = errors.get(journal)
            done.set_exception(error) if error else done.set_result(None)

    def _sync_all(
        self, unsynced: dict[Committing, Unsynced]
    ) -> dict[Committing, StorageFailedError]:
        """Sync all files, then all names; return whose failed, and why."""
        failed = self._disk.sync_files([file for what in unsynced.values() for file in what.files])
        errors: dict[Committing, StorageFailedError] = {}
        for journal, what in unsynced.items():
            try:
                for file in what.files:
                    if file in failed:
                        raise failed[file]
                if what.directory is not None:
                    self._disk.sync_directory(what.directory)
            except OSError as error:
                errors[journal] = StorageFailedError(f"{what.name}: {error.strerror or error}")
        return errors
