"""Memory that a server on this host shares: mapped here, with arrays over it."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optserve.v1.tensor_pb2 import TensorHeader
from optserve.wire import byte_count
from optserve_client.tensors import DTYPES, Array

_ALIGNMENT = 64
_HEAD_BYTES = 64
_NAME = "/memfd:optserve"  # Of the file, as /proc shows it.


class RegionError(Exception):
    """The server's memory cannot be mapped here; the message says why."""


class Region:
    """Tensors side by side in shared memory, as the contract's SharedMemory lays them out."""

    def __init__(
        self, path: Path, token: bytes, headers: Sequence[TensorHeader], *, writable: bool
    ) -> None:
        """Map the file at ``path``, if it is the one that begins with ``token``.

        Args:
            path: Of a descriptor of the server, ``/proc/7/fd/8``. Where the server's processes are
                not ours, that is another file, or none: it is looked at before it is opened.
            token: What its head must be.
            headers: Of the tensors in it.
            writable: Whether the arrays are.

        Raises:
            RegionError: It is not there, or not the right one.
        """
        offsets, count = _layout(headers)
        self.token = token
        try:
            memory = _map(path, count, writable=writable)
        except OSError as error:
            raise RegionError(f"the server's memory cannot be mapped: {error}") from error
        if not token or memory[: len(token)] != token:
            raise RegionError(f"{path} is another server's memory")
        self.arrays: list[Array] = [
            np.ndarray(tuple(header.shape), DTYPES[header.data_type], memory, offset)
            for offset, header in zip(offsets, headers, strict=True)
        ]
        """In the order of ``headers``. The memory is mapped for as long as one of them lives."""


def _layout(headers: Sequence[TensorHeader]) -> tuple[list[int], int]:
    """Return where each tensor begins, and how many bytes there are together."""
    offsets, end = [], _HEAD_BYTES
    for header in headers:
        offsets.append(end)
        end += -(-byte_count(header) // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _map(path: Path, count: int, *, writable: bool) -> mmap.mmap:
    name = path.readlink()
    if not str(name).startswith(_NAME):
        raise RegionError(f"{path} is {name}: the server's processes have other ids")
    descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != count:
            raise RegionError(f"{path} has {status.st_size} bytes; {count} are needed")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(descriptor, count, prot=prot)
    finally:
        os.close(descriptor)
