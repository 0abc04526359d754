"""The lane in which nothing travels: a worker's tensors in memory that the server shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import TensorHeader
from optserve_client._region import Region, RegionError
from optserve_client.tensors import Array, bytes_of, form_of


class SharedLane:
    """Where one worker's gradients and parameters are, if the server has offered it."""

    def __init__(self, headers: Sequence[TensorHeader]) -> None:
        """Begin without; ``headers`` are those of the session's parameters."""
        self._headers = headers
        self._regions: tuple[Region, Region] | None = None  # Of parameters, and of gradients.
        self._buffers: list[Array] = []
        self._views: list[memoryview] = []  # Of the buffers, while they are shared.
        self._known: dict[str, tuple[Array, memoryview]] = {}
        self.closed_because = "the worker's stream has not been opened"
        """Why tensors have to travel; empty if they have not."""

    @property
    def parameters(self) -> list[Array]:
        """The session's parameters, read-only, as they are; in the open lane only."""
        assert self._regions is not None
        return self._regions[0].arrays

    @property
    def buffers(self) -> list[Array]:
        """Writable arrays for gradients: always the same ones while the lane is as it is."""
        if not self._buffers:
            forms = [form_of(header) for header in self._headers]
            self._buffers = [np.zeros(shape, dtype) for dtype, shape in forms]
        return self._buffers

    def take(self, opened: pb.TrainOpened) -> None:
        """Take what the server has offered at the opening of the stream, if it can be had."""
        self.closed_because = ""
        if not opened.HasField("shared_memory"):
            self.closed_because = "the server offers none for this session at this address"
            return
        offer = opened.shared_memory
        tokens = (offer.parameters.token, offer.gradients.token)
        if self._regions and tokens == tuple(region.token for region in self._regions):
            return  # What the caller holds stays what it is.
        try:
            self._regions = (
                self._region(offer.process, offer.parameters, writable=False),
                self._region(offer.process, offer.gradients, writable=True),
            )
        except RegionError as error:
            self.closed_because = str(error)
            return
        self._buffers = self._regions[1].arrays
        self._views = [bytes_of(buffer) for buffer in self._buffers]
        names = (header.name for header in self._headers)
        self._known = dict(zip(names, zip(self._buffers, self._views, strict=True), strict=True))

    @property
    def token(self) -> bytes:
        """What the memory for gradients is known by; empty if there is none."""
        return self._regions[1].token if self._regions and not self.closed_because else b""

    def bytes_of(self, name: str, gradient: object) -> memoryview | None:
        """Return the bytes of a buffer that is the gradient of its own parameter; else None.

        To look at each array of a large model takes a millisecond.
        """
        buffer, view = self._known.get(name, (None, None))
        return view if gradient is buffer else None

    def write(self, position: int, gradient: memoryview) -> bool:
        """Put a gradient's bytes where the server reads them; if they are there, it costs nothing.

        Args:
            position: Of its parameter.
            gradient: As many bytes as the parameter has.

        Returns:
            Whether the caller's gradient is elsewhere, and so stays what it is.
        """
        if gradient is self._views[position]:
            return False
        source, target = np.asarray(gradient), np.asarray(self._views[position])
        if source.ctypes.data == target.ctypes.data:
            return False
        np.copyto(target, source)  # copy: the caller's gradient to shared memory.
        return True

    def _region(self, process: int, offer: pb.SharedRegion, *, writable: bool) -> Region:
        path = Path(f"/proc/{process}/fd/{offer.descriptor}")
        return Region(path, offer.token, self._headers, writable=writable)
