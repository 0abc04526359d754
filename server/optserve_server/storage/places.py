"""Where everything is in a data directory, and how a name comes to stand for something whole.

    version.json                              the format of all this
    lock                                      held by the server that uses the directory
    sessions/<session id>/
        head.json                             what the catalogue says of it
        snapshot-00000000000000000120/        tensors.safetensors, manifest.json
        journal-00000000000000000121.log
    checkpoints/<session id>-<hash of name>/  tensors.safetensors, manifest.json

What is being written ends in ``.tmp``, what is being deleted in ``.deleted``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from optserve_server.core.storage import CheckpointKey, DamagedError, Json
from optserve_server.storage.disk import Disk, Entry, read_file, remove_tree
from optserve_server.storage.document import decode_document, encode_document

_T = TypeVar("_T")

VERSION = "version.json"
LOCK = "lock"
SESSIONS = "sessions"
CHECKPOINTS = "checkpoints"
HEAD = "head.json"
UNFINISHED = ".tmp"
DELETED = ".deleted"

_SNAPSHOT = "snapshot-"
_SEGMENT, _SEGMENT_END = "journal-", ".log"


def identity() -> dict[str, Json]:
    """Return what VERSION says of a new data directory: of no two the same."""
    return {"id": secrets.token_hex(16)}


def is_finished(name: str) -> bool:
    """Return whether what has the name is neither being written nor being deleted."""
    return not name.endswith((UNFINISHED, DELETED))


def session_directory(session_id: str) -> str:
    """Return where a session is."""
    return f"{SESSIONS}/{session_id}"


def checkpoint_directory(key: CheckpointKey) -> str:
    """Return where a checkpoint is: names may be any text, so their hash stands for them."""
    text = json.dumps([key.tenant, key.name]).encode()
    return f"{CHECKPOINTS}/{key.session_id}-{hashlib.sha256(text).hexdigest()[:32]}"


def snapshot_name(sequence: int) -> str:
    """Return the name of the snapshot after record ``sequence``."""
    return f"{_SNAPSHOT}{sequence:020d}"


def segment_name(first: int) -> str:
    """Return the name of the segment that begins with record ``first``."""
    return f"{_SEGMENT}{first:020d}{_SEGMENT_END}"


def snapshots_in(entries: Sequence[Entry]) -> list[int]:
    """Return the numbers of the snapshots in a session's directory, newest first."""
    names = (each.name.removeprefix(_SNAPSHOT) for each in entries if each.is_directory)
    return sorted((int(name) for name in names if _is_number(name)), reverse=True)


@dataclass(slots=True)
class Segment:
    """A file of a journal."""

    first: int
    """Number of its first record."""
    path: str
    byte_count: int


def segments_in(directory: str, entries: Sequence[Entry]) -> list[Segment]:
    """Return the segments in a session's directory, in order."""
    found = []
    for each in entries:
        number = each.name.removeprefix(_SEGMENT).removesuffix(_SEGMENT_END)
        if each.byte_count is not None and _is_number(number):
            path = f"{directory}/{each.name}"
            found.append(Segment(first=int(number), path=path, byte_count=each.byte_count))
    return sorted(found, key=lambda segment: segment.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """What the catalogue says of a session or a checkpoint; every manifest says it, too."""

    session_id: str
    order: int
    """Larger than of any that was there when it was created."""
    facts: dict[str, Json]
    tenant: str = ""
    """A checkpoint's: see CheckpointKey."""
    name: str = ""

    def encode(self) -> dict[str, Json]:
        """Return it as JSON."""
        return {
            "session_id": self.session_id,
            "order": self.order,
            "facts": self.facts,
            "tenant": self.tenant,
            "name": self.name,
        }

    @classmethod
    def decode(cls, path: str, content: Mapping[str, Any]) -> Owner:
        """Return what encode() has made.

        Raises:
            DamagedError: It has not made that; ``path`` is where it was found.
        """
        try:
            return cls(
                session_id=str(content["session_id"]),
                order=int(content["order"]),
                facts=dict(content["facts"]),
                tenant=str(content["tenant"]),
                name=str(content["name"]),
            )
        except (KeyError, TypeError, ValueError):
            raise DamagedError(path, 0, "it lacks something") from None


def write_head(disk: Disk, directory: str, owner: Owner) -> None:
    """Write a session's head, in the place of the one that is there; synced, but for its name."""
    unfinished = f"{directory}/{HEAD}{UNFINISHED}"
    write_document(disk, unfinished, owner.encode())
    disk.rename(unfinished, f"{directory}/{HEAD}")


def read_head(disk: Disk, directory: str) -> Owner:
    """Return what a session's head says.

    Raises:
        DamagedError: It is not what was written, or is not there.
        StorageVersionError: A newer server wrote it.
    """
    path = f"{directory}/{HEAD}"
    try:
        return Owner.decode(path, decode_document(path, read_file(disk, path)))
    except FileNotFoundError:
        raise DamagedError(path, 0, "it is missing") from None


def write_document(disk: Disk, path: str, content: dict[str, Json]) -> None:
    """Write a document, in the place of what is there, and sync it, but for its name."""
    with contextlib.suppress(FileNotFoundError):
        disk.remove(path)
    file = disk.create(path)
    try:
        file.write_at(0, [encode_document(content)])
        file.sync()
    finally:
        file.close()


def save_directory(disk: Disk, path: str, write: Callable[[str], _T]) -> _T:
    """Have a directory written under another name, and give it its own: whole or not at all.

    Args:
        disk: Where.
        path: Its name. What has it goes.
        write: Writes and syncs all that shall be in it; gets the other name.

    Returns:
        What ``write`` has returned.
    """
    unfinished = path + UNFINISHED
    remove_if_there(disk, unfinished)
    try:
        written = write(unfinished)
        remove_if_there(disk, path)
        disk.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_if_there(disk, unfinished)
        raise
    parent = path.rpartition("/")[0]
    try:
        disk.sync_directory(parent)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.rename(path, unfinished)
            disk.sync_directory(parent)  # Or it may have the name again when the power has gone.
            remove_if_there(disk, unfinished)
        raise
    return written


def remove_if_there(disk: Disk, path: str) -> None:
    """Remove a directory with all that is in it, or what there is of it."""
    with contextlib.suppress(FileNotFoundError):
        remove_tree(disk, path)


def tree_bytes(disk: Disk, path: str) -> int:
    """Return the size of all files in a directory; 0 if it is not there."""
    count = 0
    with contextlib.suppress(FileNotFoundError):  # Others may remove it meanwhile.
        for each in disk.entries(path):
            inner = f"{path}/{each.name}"
            count += tree_bytes(disk, inner) if each.byte_count is None else each.byte_count
    return count


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
