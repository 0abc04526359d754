"""Where tensors live: on the CPU, or on a CUDA device with pinned memory beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from optserve_server.core.streams import Streams
from optserve_server.core.tensors import TensorSpec

_MEMORY_SHARE = (
    0.8  # Of what the device has; the rest is for torch itself, for messages, and for others.
)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class DeviceUnavailableError(Exception):
    """The device that was asked for is not there; the message says what is."""


class Device:
    """A device that sessions live on."""

    def __init__(self, name: str) -> None:
        """Find the device.

        Args:
            name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a CUDA device if there is one.

        Raises:
            DeviceUnavailableError: It is not there.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
            raise DeviceUnavailableError(
                f"{name!r} is no device; use auto, cpu, cuda or cuda:INDEX"
            )
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"{name!r} is not there: torch {torch.__version__} sees"
                f" {torch.cuda.device_count()} CUDA devices"
            )
        self.torch = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")
        self.is_cuda = kind == "cuda"
        self.streams = Streams(self.torch, torch.cuda) if self.is_cuda else None
        """Of copies between it and the CPU. None: it is the CPU."""

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return (
            torch.cuda.get_device_name(self.torch)
            if self.is_cuda
            else f"CPU, {os.cpu_count()} cores"
        )

    def memory_bytes(self) -> int:
        """Return how much memory sessions may take here by default.

        80 % of the device's, or of the container's.
        """
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.torch).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
            total = total if limit == "max" else min(total, int(limit))
        return int(total * _MEMORY_SHARE)

    def allocated_bytes(self) -> float:
        """Return how much memory torch has allocated on the CUDA device."""
        return float(torch.cuda.memory_allocated(self.torch))

    def zeros(self, spec: TensorSpec) -> Tensor:
        """Return a new tensor of zeros on the device."""
        return torch.zeros(spec.shape, dtype=spec.dtype, device=self.torch)

    def staging(self, spec: TensorSpec) -> Tensor:
        """Return a new tensor on the CPU, of any content, for bytes to be received into.

        Pinned beside CUDA.
        """
        return torch.empty(spec.shape, dtype=spec.dtype, pin_memory=self.is_cuda)

    def mirror(self, tensor: Tensor) -> Tensor:
        """Return a CPU tensor for what ``tensor`` holds: the tensor itself if it is there."""
        if self.streams is None:
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=self.is_cuda)

    def load(self, staging: Tensor) -> Tensor:
        """Return the staging tensor's content on the device: the tensor itself on the CPU."""
        return staging.to(self.torch, non_blocking=True)

    def unload(self, tensors: Sequence[Tensor], mirrors: Sequence[Tensor]) -> None:
        """Copy tensors, which may still be being computed, to their mirrors; return when done."""
        if self.streams:
            self.streams.unload(zip(tensors, mirrors, strict=True))
