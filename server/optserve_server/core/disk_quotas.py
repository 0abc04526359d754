"""Disk quotas: how much of the disk each tenant has, and may have.

What is on disk when the server starts is counted, and from then on what is written and deleted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from optserve_server.core.limits import Limits
from optserve_server.core.storage import Record, SessionStore, Snapshot, StorageFullError
from optserve_server.core.tenant import named

# What stands beside the bytes of tensors, until the file is there, and is counted as what it is.
_FACTS_BYTES = 4096
_TENSOR_BYTES = 256


class OverQuotaError(StorageFullError):
    """The tenant has no room. Nothing was written; the same works once it has deleted something."""

    def __init__(self, tenant: str, used: int, most: int, count: int) -> None:
        """Say that ``count`` bytes are too much for a tenant that has ``used`` of ``most``."""
        super().__init__(
            f"{named(tenant)} has {used} of {most} bytes on disk; {count} are too many"
        )
        self.free = max(0, most - used)
        self.count = count


class DiskQuotas:
    """What each tenant has on disk. May be called in any thread: many write to disks."""

    def __init__(self, limits: Limits) -> None:
        """Give each tenant at most what ``limits`` allow; 0 is no quota."""
        self._most = limits.tenant_disk_bytes_max
        self._lock = threading.Lock()
        self._parts: dict[str, dict[Hashable, int]] = {}
        self._used: dict[str, int] = {}

    def admit(self, tenant: str, part: Hashable, count: int, *, beside: int = 0) -> None:
        """Count so many bytes more for a part of what a tenant has, before they are written.

        Args:
            tenant: Whose it is.
            part: What they are for: a session, or a checkpoint.
            count: Bytes.
            beside: How many must be left free then.

        Raises:
            OverQuotaError: It would be more than the tenant may have.
        """
        with self._lock:
            used = self._used.get(tenant, 0)
            if self._most and used + count + beside > self._most:
                raise OverQuotaError(tenant, used + beside, self._most, count)
            self._set(tenant, part, self._parts.get(tenant, {}).get(part, 0) + count)

    def settle(self, tenant: str, part: Hashable, count: int) -> None:
        """Count what a part really has; 0: it is gone."""
        with self._lock:
            self._set(tenant, part, count)

    def free_bytes(self, tenant: str) -> float:
        """Return how much more a tenant may have."""
        with self._lock:
            return self._most - self._used.get(tenant, 0) if self._most else math.inf

    def _set(self, tenant: str, part: Hashable, count: int) -> None:
        parts = self._parts.setdefault(tenant, {})
        self._used[tenant] = self._used.get(tenant, 0) + count - parts.pop(part, 0)
        if count:
            parts[part] = count
        if not parts:
            del self._parts[tenant], self._used[tenant]


class Footprint:
    """What one session has on disk: its snapshots, and its journal."""

    def __init__(
        self,
        quotas: DiskQuotas,
        tenant: str,
        store: SessionStore,
        *,
        kept_bytes: int,
        state_bytes: int,
    ) -> None:
        """Count a session that is there.

        Args:
            quotas: Of its tenant, among others.
            tenant: Whose it is.
            store: Holds it.
            kept_bytes: What the store has beside the journal.
            state_bytes: How large a snapshot is.
        """
        self._quotas = quotas
        self._tenant = tenant
        self._store = store
        self._lock = threading.Lock()  # A snapshot is written while records are.
        self._under_way = 0
        self._kept_bytes = kept_bytes
        self._snapshot_bytes = state_bytes
        self._settle()

    @property
    def free_bytes(self) -> float:
        """How much more the journal may have."""
        return self._quotas.free_bytes(self._tenant) - self._beside_bytes

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Count a record that is written in a block.

        Raises:
            OverQuotaError: The tenant has no room for it, and for the snapshots to come.
        """
        count = _FACTS_BYTES + sum(_bytes_of(tensor.nbytes) for _, tensor in record.tensors)
        with self._writing(count, beside=self._beside_bytes):
            yield

    @contextmanager
    def saving(self, snapshot: Snapshot) -> Iterator[None]:
        """Count a snapshot that is written in a block; those before it stay until it is there.

        Raises:
            OverQuotaError: The tenant has no room for it.
        """
        count = snapshot_bytes(snapshot)
        with self._writing(count, beside=0):
            yield
            self._snapshot_bytes = count
            self._kept_bytes = self._store.kept_bytes

    @property
    def _beside_bytes(self) -> int:
        """How much the journal leaves free: two snapshots are kept while a third is written."""
        return max(0, 3 * self._snapshot_bytes - self._kept_bytes)

    @contextmanager
    def _writing(self, count: int, *, beside: int) -> Iterator[None]:
        with self._lock:
            self._quotas.admit(self._tenant, self._store.session_id, count, beside=beside)
            self._under_way += count
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= count
                self._settle()

    def _settle(self) -> None:
        count = self._kept_bytes + self._store.journal_bytes + self._under_way
        self._quotas.settle(self._tenant, self._store.session_id, count)


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Return how much room a snapshot takes on disk; its facts may have more than is usual."""
    return _FACTS_BYTES + sum(_bytes_of(tensor.nbytes) for tensor in snapshot.tensors.values())


def _bytes_of(tensor_bytes: int) -> int:
    return tensor_bytes + _TENSOR_BYTES
