"""A device that copies late: what streams may do at the worst, on the CPU.

Computations are made at once. A copy that is asked for on another stream is made when somebody
waits for it, and not before: who forgets to wait computes with what was there earlier.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optserve_server.core.device import Device
from optserve_server.core.streams import Streams
from optserve_server.core.tensors import TensorSpec


class LateStream:
    """Copies, in order, none of them before somebody waits."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        """Of what was copied, or will be, in the order in which it was asked for."""
        self.follows = False
        """Whether what is asked next comes after all computations that were asked for."""
        self._copies: deque[tuple[Tensor, Tensor]] = deque()
        self._lock = RLock()  # Asked for by the event loop, and waited for in threads.

    def ask(self, source: Tensor, target: Tensor) -> None:
        """Ask for a copy."""
        with self._lock:
            self._copies.append((source, target))
            self.shapes.append(target.shape)

    def wait(self) -> None:
        """Make the copies that were asked for."""
        with self._lock:
            while self._copies:
                source, target = self._copies.popleft()
                target.copy_(source)

    def wait_stream(self, other: LateStream) -> None:
        """Come after what was asked of the other stream."""
        other.wait()
        self.follows = True


class LateEvent:
    """A point on a stream."""

    def record(self, stream: LateStream) -> None:
        """Be where the stream is."""
        self._stream = stream

    def synchronize(self) -> None:
        """Wait for what was asked of the stream."""
        self._stream.wait()


class _Asking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has copies made by a stream."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(
        self,
        func: object,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        assert func is torch.ops.aten.copy_.default, "only copies are made beside computations"
        target: Tensor = args[0]
        self._stream.ask(args[1], target)
        return target


@contextmanager
def _stream(stream: LateStream) -> Iterator[None]:
    """Ask a stream for the copies of a block."""
    assert stream.follows, "others may have the memory still"
    stream.follows = False
    with _Asking(stream):
        yield


class _LateStreams(Streams):
    """Notes what room is made."""

    def __init__(self, device: torch.device, module: ModuleType) -> None:
        super().__init__(device, module)
        self.rooms: list[weakref.ref[Tensor]] = []

    def room(self, spec: TensorSpec) -> Tensor:
        room = super().room(spec)
        self.rooms.append(weakref.ref(room))
        return room


class LateDevice(Device):
    """The CPU, with gradients and parameters in other memory than what computes with them."""

    def __init__(self) -> None:
        super().__init__("cpu")
        computing, self.loads, self.unloads = LateStream(), LateStream(), LateStream()
        made = iter([self.loads, self.unloads])
        module = ModuleType("late")
        vars(module).update(
            Stream=lambda _: next(made),
            Event=LateEvent,
            stream=_stream,
            current_stream=lambda _: computing,
        )
        self._late = self.streams = _LateStreams(self.torch, module)

    def rooms(self) -> list[Tensor]:
        """Return the room that there is for gradients, beside where they are received."""
        return [room for each in self._late.rooms if (room := each()) is not None]


class StandingDevice(Device):
    """The CPU, with what torch has there in the place of streams."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.streams = Streams(self.torch, torch.cpu)
