"""Memory that a session shares with a client on its host.

A region is a file without a name in any file system, so that nothing of it is left when the last
process that maps it has gone, however it went. Its size is sealed: nobody can shrink it under the
server, which would die of SIGBUS at its next look.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core.tensors import TensorSpec

TOKEN_BYTES = 16  # 128 random bits: no other file begins with them.
ALIGNMENT = 64  # A cache line, and the widest vector register there is.
_HEAD_BYTES = ALIGNMENT  # The token, then zeros.
_MODE = 0o600
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python names it from 3.13 on.


class RegionUnavailableError(Exception):
    """Memory cannot be shared; the message says why."""


class Region:
    """Tensors side by side in shared memory, each at the next multiple of 64 bytes.

    The first 64 bytes are the head, which begins with the token.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, read_only: bool) -> None:
        """Make room for ``specs``, filled with zeros; memory is taken where it is written.

        Args:
            specs: What the tensors are.
            read_only: Whether this process alone may write: the kernel holds everybody else to it.

        Raises:
            RegionUnavailableError: The platform has no sealed memory, or there are no descriptors
                to spare.
        """
        offsets, self.byte_count = _layout(specs)
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.descriptor = _create()
        """Of this process; others open it as ``/proc/<process>/fd/<descriptor>``."""
        # The end of the offer, also when nobody asks for it. Whoever has mapped the region keeps
        # it, and so do the tensors here.
        self.close = weakref.finalize(self, os.close, self.descriptor)
        try:
            os.fchmod(self.descriptor, _MODE)
            os.ftruncate(self.descriptor, self.byte_count)
            memory = mmap.mmap(self.descriptor, self.byte_count)
            _seal(self.descriptor, read_only=read_only)
        except OSError as error:
            self.close()
            raise RegionUnavailableError(f"memory cannot be shared: {error}") from error
        memory[:TOKEN_BYTES] = self.token
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.tensors = _views(whole, offsets, specs)
        """On the CPU, in the order of ``specs``: views of one memory, which lives as long as one of
        them does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Where a worker on this host finds its tensors."""

    parameters: Region
    """The session's, for the worker to read."""
    gradients: Region
    """The worker's, for it to write."""


def private(specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Return zeros that lie as the tensors of a Region do, in memory of this process alone."""
    offsets, byte_count = _layout(specs)
    return _views(torch.zeros(byte_count, dtype=torch.uint8), offsets, specs)


def _views(whole: Tensor, offsets: Sequence[int], specs: Sequence[TensorSpec]) -> list[Tensor]:
    return [
        whole[offset : offset + spec.byte_count].view(spec.dtype).view(spec.shape)
        for offset, spec in zip(offsets, specs, strict=True)
    ]


def _layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Return where each tensor begins, and how many bytes there are together."""
    offsets, end = [], _HEAD_BYTES
    for spec in specs:
        offsets.append(end)
        end += -(-spec.byte_count // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _create() -> int:
    if not hasattr(os, "memfd_create"):
        raise RegionUnavailableError("the platform has no memfd_create")
    try:
        descriptor = os.memfd_create("optserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise RegionUnavailableError(f"memory cannot be shared: {error}") from error
    # The kernel gives out the lowest one that is free: one of the upper half means that half of
    # them are taken, and the rest is for connections.
    if 0 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 <= descriptor:
        os.close(descriptor)
        raise RegionUnavailableError("half of the process's file descriptors are in use")
    return descriptor


def _seal(descriptor: int, *, read_only: bool) -> None:
    """Fix the size for ever, and if asked the content, but for the mapping that is there."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | (_F_SEAL_FUTURE_WRITE if read_only else 0))
