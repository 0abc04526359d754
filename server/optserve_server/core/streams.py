"""Copies between the CPU and a CUDA device, beside what the device computes.

A device does what it is asked on one stream in order, and what is asked on different streams at the
same time. All computations of the server share torch's current stream; copies have two of their
own, one for each direction, as the device can copy in both at once. Who asks does not wait for what
was asked: what has to come after what is said here, to the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from optserve_server.core.tensors import TensorSpec

Copies: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""Each from the first tensor to the second."""


class Streams:
    """A device's streams of copies. For any thread."""

    def __init__(self, device: torch.device, module: ModuleType) -> None:
        """Make them.

        Args:
            device: Which one.
            module: ``torch.cuda``, or what stands for it.
        """
        self._device = device
        self._module = module
        self._loads = module.Stream(device)
        self._unloads = module.Stream(device)

    def room(self, spec: TensorSpec) -> Tensor:
        """Return memory on the device, of any content, for load() to fill."""
        memory = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        if memory.is_cuda:
            # Or it would be given to others as soon as nobody here holds it, though a copy for a
            # step that was given up may still be on its way.
            memory.record_stream(self._loads)
        return memory

    def load(self, copies: Copies) -> None:
        """Ask for copies from pinned memory to room().

        They come after all loads and computations that were asked for before: who had the room, or
        the memory that it was made of, let go of it on the CPU's word only.
        """
        self._loads.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._loads):
            for source, target in copies:
                target.copy_(source, non_blocking=True)  # copy: pinned memory to the device.

    def loaded(self) -> None:
        """Have computations that are asked for from now on wait for what load() was asked for."""
        self._module.current_stream(self._device).wait_stream(self._loads)

    def unload(self, copies: Copies) -> None:
        """Copy to pinned memory what was computed; return once it is there.

        Then all that was asked for to compute it has been done, too.
        """
        self._unloads.wait_stream(self._module.current_stream(self._device))
        done = self._module.Event()
        with self._module.stream(self._unloads):
            for source, target in copies:
                target.copy_(source, non_blocking=True)  # copy: the device to pinned memory.
            done.record(self._unloads)
        # Synchronise here and nowhere else: the answer needs the bytes. Others' work is not waited
        # for, as it would be by a look at the whole device.
        done.synchronize()
