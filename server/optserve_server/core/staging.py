"""Where a worker's gradients are received, and how they come to the session's device.

On the CPU they are received where they are needed. Beside CUDA they are received into pinned
memory, and each has room on the device, to which it is copied as soon as its last byte is there,
while others still come. The step waits for the last of them, on the device.

Of a step that is given up nothing has to be waited for or undone. Copies to one room are made in
the order in which they were asked for, and a step counts those alone that it has asked for itself,
once its own bytes were there: they come last, whatever an earlier step still copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from optserve_server.core.device import Device
from optserve_server.core.streams import Streams
from optserve_server.core.tensors import TensorSpec

# Less waits for the step: to ask for a copy takes the event loop some 0.01 ms, in which a device
# copies about as much. So of 1 GB of gradients that come in a second, 0.04 s are spent on asking.
EARLY_BYTES_MIN = 1 << 18


class Staging:
    """The memory of one worker's gradients.

    Made when it is first needed, reserved since the session was created, the same for all steps.
    """

    __slots__ = ("_all", "_device", "_received", "_rooms", "_specs", "is_shared")

    def __init__(
        self, specs: Sequence[TensorSpec], device: Device, shared: Sequence[Tensor] = ()
    ) -> None:
        """Have memory for the gradients of parameters.

        Args:
            specs: The parameters.
            device: The session's.
            shared: Memory that the client writes itself, for all of them. Empty: there is none.
        """
        self.is_shared = bool(shared)
        """Whether the client writes it itself."""
        self._specs = specs
        self._device = device
        self._received = dict(enumerate(shared))
        self._rooms: dict[int, Tensor] = {}
        self._all: Sequence[Tensor] = ()

    def all(self) -> Sequence[Tensor]:
        """Return what the gradients of all parameters are received into: always the same list."""
        if not self._all:
            self._all = [self.at(position) for position in range(len(self._specs))]
        return self._all

    def at(self, position: int) -> Tensor:
        """Return what the gradient of a parameter is received into, on the CPU."""
        if position not in self._received:
            self._received[position] = self._device.staging(self._specs[position])
        return self._received[position]

    def room(self, position: int, streams: Streams) -> Tensor:
        """Return where the gradient of a parameter goes, on a device that has streams."""
        if position not in self._rooms:
            self._rooms[position] = streams.room(self._specs[position])
        return self._rooms[position]

    def loading(self, positions: Sequence[int] | None) -> Loading | None:
        """Return what brings a step's gradients to the device; None if they are received there.

        Args:
            positions: Of those that will come, in their order. None: all.
        """
        streams = self._device.streams
        if streams is None:
            return None
        return Loading(self, streams, range(len(self._specs)) if positions is None else positions)


class Loading:
    """The way of one step's gradients to the device."""

    def __init__(self, staging: Staging, streams: Streams, positions: Sequence[int]) -> None:
        """Bring gradients from a worker's memory.

        Args:
            staging: The memory.
            streams: The device's.
            positions: Of the gradients that come, in the order in which they were announced.
        """
        self._staging = staging
        self._streams = streams
        self._positions = positions
        self._begun: set[int] = set()

    def received(self, tensors: Iterable[int]) -> None:
        """Begin to copy gradients, of which all bytes have come. Waits for nothing.

        Args:
            tensors: Their places among those that were announced.
        """
        staging, streams = self._staging, self._streams
        if staging.is_shared:  # It is not pinned: a copy of it would not be asked for, but made.
            return
        positions = {self._positions[tensor] for tensor in tensors} - self._begun
        coming = [each for each in positions if staging.at(each).nbytes >= EARLY_BYTES_MIN]
        if coming:
            streams.load([(staging.at(each), staging.room(each, streams)) for each in coming])
            self._begun.update(coming)

    def finish(self) -> dict[int, Tensor]:
        """Have computations that are asked for from now on wait until all are there.

        What has not begun is copied among the computations.

        Returns:
            The gradients on the device, by position.
        """
        self._streams.loaded()
        loaded = {each: self._staging.room(each, self._streams) for each in self._positions}
        for position, room in loaded.items():
            if position not in self._begun:
                room.copy_(self._staging.at(position), non_blocking=True)
        return loaded
