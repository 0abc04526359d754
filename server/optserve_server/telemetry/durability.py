"""The metrics of what durable sessions write and wait for, and of the archive's copy of it."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from optserve_server.core.events import SnapshotSaved

# From a disk that has a cache of its own to one that is overloaded.
_SYNC_BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
# From a small model to one that fills a GPU.
_STATE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)


class DurabilityMetrics:
    """The part of an observer that hears of journals, snapshots and archives."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Show the metrics in ``registry``."""
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        self._journal_bytes = counter("optserve_journal_bytes_total", "Bytes written to journals.")
        self._sync_seconds = Histogram(
            "optserve_journal_sync_duration_seconds",
            "Time that a change waited for stable storage after it had been made.",
            buckets=_SYNC_BUCKETS_S,
            registry=registry,
        )
        self._snapshot_seconds = Histogram(
            "optserve_snapshot_duration_seconds",
            "Time that a snapshot took, in the background.",
            buckets=_STATE_BUCKETS_S,
            registry=registry,
        )
        self._snapshot_time = gauge(
            "optserve_last_snapshot_timestamp_seconds",
            "When the last snapshot of any session was saved.",
        )
        self._snapshot_failures = counter(
            "optserve_snapshot_failures_total",
            "Snapshots that could not be saved, and are tried again.",
        )
        self._parked = gauge("optserve_sessions_parked", "Sessions that lie on disk only.")
        self._restore_seconds = Histogram(
            "optserve_restore_duration_seconds",
            "Time that a session took to come back from disk.",
            buckets=_STATE_BUCKETS_S,
            registry=registry,
        )
        self._archive_time = gauge(
            "optserve_last_archive_timestamp_seconds",
            "When the archive last had everything that was finished.",
        )
        self._archive_failures = counter(
            "optserve_archive_failures_total",
            "Looks after which the archive is behind; the next one tries again.",
        )

    def journal_written(self, byte_count: int) -> None:
        """Count them."""
        self._journal_bytes.inc(byte_count)

    def journal_synced(self, seconds: float) -> None:
        """Observe it."""
        self._sync_seconds.observe(seconds)

    def snapshot_saved(self, event: SnapshotSaved) -> None:
        """Observe how long it took, and remember when it was."""
        self._snapshot_seconds.observe(event.seconds)
        self._snapshot_time.set(event.time_s)

    def snapshot_failed(self) -> None:
        """Count it."""
        self._snapshot_failures.inc()

    def sessions_parked(self, count: int) -> None:
        """Show how many there are."""
        self._parked.set(count)

    def session_restored(self, seconds: float) -> None:
        """Observe it."""
        self._restore_seconds.observe(seconds)

    def archive_shipped(self) -> None:
        """Remember when it was."""
        self._archive_time.set_to_current_time()

    def archive_failed(self) -> None:
        """Count it."""
        self._archive_failures.inc()
