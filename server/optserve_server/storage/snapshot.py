"""A snapshot on disk: a directory with the tensors, and a manifest that says what they must be.

    tensors.safetensors   absent if there are none
    manifest.json         sequence, facts, origin, size and checksum of the tensors

It is written under another name, synced, and renamed: a snapshot that has its name is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash
from torch import Tensor

from optserve_server.core import failpoints
from optserve_server.core.safetensors import decode_tensors, encode_tensors
from optserve_server.core.storage import DamagedError, Json, Origin, Snapshot
from optserve_server.storage.disk import Disk, File, read_file, readable
from optserve_server.storage.document import decode_document, encode_document

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_BURST_BYTES = 16 << 20  # Some 20 ms of a disk that writes 1 GB/s.


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a snapshot says of itself."""

    sequence: int
    origin: Origin
    owner: Mapping[str, Json]
    """Whose it is: what the catalogue shall say, of a session or of a checkpoint."""
    facts: Mapping[str, Json]
    """The snapshot's own; see Snapshot.facts."""
    tensors_bytes: int | None
    """Size of the file of tensors. None: there is no such file."""
    tensors_checksum: str
    """XXH3, 128 bits, of that file."""


def write_snapshot(
    disk: Disk, path: str, snapshot: Snapshot, origin: Origin, owner: Mapping[str, Json]
) -> int:
    """Write a snapshot into the directory ``path``, which must not be there, and sync it.

    The directory's own name is the caller's to sync.

    Returns:
        How many bytes it has.
    """
    disk.make_directory(path)
    files: list[File] = []
    try:
        tensors_bytes, checksum = None, ""
        if snapshot.tensors:
            pieces = encode_tensors(snapshot.tensors)
            tensors_bytes = sum(len(piece) for piece in pieces)
            hasher = xxhash.xxh3_128()
            for piece in pieces:
                hasher.update(piece)
            checksum = hasher.hexdigest()
            files.append(disk.create(f"{path}/{TENSORS}"))
            _write_evenly(files[-1], pieces)
        failpoints.reach("snapshot-half-written")
        text = encode_document(
            {
                "sequence": snapshot.sequence,
                "origin": {"torch": origin.torch, "device": origin.device},
                "owner": owner,
                "facts": snapshot.facts,
                "tensors": {"bytes": tensors_bytes, "xxh3_128": checksum},
            }
        )
        files.append(disk.create(f"{path}/{MANIFEST}"))
        files[-1].write_at(0, [text])
        for error in disk.sync_files(files).values():
            raise error
    finally:
        for file in files:
            file.close()
    disk.sync_directory(path)
    return (tensors_bytes or 0) + len(text)


def decode_manifest(path: str, data: bytes) -> Manifest:
    """Return what a manifest says.

    Raises:
        DamagedError: It is not what was written.
        StorageVersionError: A newer server wrote it.
    """
    content = decode_document(path, data)
    try:
        return Manifest(
            sequence=_whole(content["sequence"]),
            origin=Origin(
                torch=str(content["origin"]["torch"]), device=str(content["origin"]["device"])
            ),
            owner=dict(content["owner"]),
            facts=dict(content["facts"]),
            tensors_bytes=(
                None if content["tensors"]["bytes"] is None else _whole(content["tensors"]["bytes"])
            ),
            tensors_checksum=str(content["tensors"]["xxh3_128"]),
        )
    except (KeyError, TypeError, ValueError):
        raise DamagedError(path, 0, "it lacks something") from None


def read_manifest(disk: Disk, path: str) -> Manifest:
    """Return what the snapshot in the directory ``path`` says of itself.

    Raises:
        DamagedError: It is not what was written, or is not there.
        StorageVersionError: A newer server wrote it.
    """
    name = f"{path}/{MANIFEST}"
    try:
        return decode_manifest(name, read_file(disk, name))
    except FileNotFoundError:
        raise DamagedError(name, 0, "it is missing") from None


def read_snapshot(disk: Disk, path: str) -> tuple[Manifest, Snapshot]:
    """Return the snapshot in the directory ``path``; each of its tensors has memory of its own.

    Raises:
        DamagedError: It is not what was written.
        StorageVersionError: A newer server wrote it.
    """
    manifest = read_manifest(disk, path)
    tensors: Mapping[str, Tensor] = {}
    if manifest.tensors_bytes is not None:
        name = f"{path}/{TENSORS}"
        tensors = _read_tensors(disk, name, manifest.tensors_bytes, manifest.tensors_checksum)
    return manifest, Snapshot(sequence=manifest.sequence, facts=manifest.facts, tensors=tensors)


def _write_evenly(file: File, pieces: Sequence[memoryview | bytes]) -> None:
    """Write a large file in bursts, each synced: commits wait for no more than one of them.

    What is left after the last burst is the caller's to sync, together with other files.
    """
    offset = size = 0
    burst: list[memoryview | bytes] = []
    for piece in pieces:
        for begin in range(0, len(piece), _BURST_BYTES):
            burst.append(memoryview(piece)[begin : begin + _BURST_BYTES])
            size += len(burst[-1])
            if size >= _BURST_BYTES:
                file.write_at(offset, burst)
                file.sync()
                offset, size, burst = offset + size, 0, []
    file.write_at(offset, burst)


def _read_tensors(disk: Disk, path: str, byte_count: int, checksum: str) -> Mapping[str, Tensor]:
    try:
        file = disk.open(path)
    except FileNotFoundError:
        raise DamagedError(path, 0, "it is missing") from None
    hasher, offset = xxhash.xxh3_128(), 0

    def read(target: memoryview) -> None:
        nonlocal offset
        with readable(path):
            file.read_at(offset, target)
        hasher.update(target)
        offset += len(target)

    try:
        size = file.size()
        if size != byte_count:  # Before any memory is taken for it.
            what = f"it has {size} bytes; {byte_count} were written"
            raise DamagedError(path, min(size, byte_count), what)
        tensors = decode_tensors(path, byte_count, read)
    finally:
        file.close()
    if hasher.hexdigest() != checksum:
        raise DamagedError(path, 0, "it is not what was written")
    return tensors


def _whole(value: Any) -> int:  # noqa: ANN401 It is what JSON gave.
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value
