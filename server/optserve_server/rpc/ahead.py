"""The answer to a step, sent while the step's gradients still arrive.

So both directions of a link are in use at once. What is sent is a preview: the parameters count
only once the step's result has come, and the session does not know of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import operator
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from optserve import wire
from optserve_server.core.actor import SessionActor
from optserve_server.core.limits import Limits
from optserve_server.core.preview import Piece, one_thread
from optserve_server.core.round import Contribution
from optserve_server.rpc import transfer
from optserve_server.rpc.encoded import ParameterSources

# What is computed at once: the way to a thread and back is worth less than the shortest batch. Each
# takes a dozen calls of torch, at each of which the thread may have to wait for the interpreter: so
# as it falls behind, they become longer.
_BATCH_BYTES_MIN = 2 << 20
_BATCH_BYTES_MAX = 4 << 20
# What may wait to be sent. The rest is sent after the step.
_WAITING_BYTES_MAX = 16 << 20
# After so many, whoever wants to change the session gets a turn.
_BATCHES_AT_A_TIME = 16

MEMORY_BYTES = 48 << 20
"""What it takes at most.

What waits, and a batch with its gradients, its state and torch's temporaries: 7 of each.
"""


class _Batch(NamedTuple):
    """What was computed at once."""

    parts: Sequence[wire.Part]
    byte_count: int
    """Of the elements, not of what travels."""


class Ahead:
    """Computes and sends the parameters of one open step; the computing is done in a thread.

    Made at the step's begin; received() is called as gradients arrive, finish() after the last one,
    sent() once the step is decided or rest() once it is applied, or give_up() if it is not to be;
    cancel() at any time.
    """

    def __init__(
        self,
        actor: SessionActor,
        gradients: Sequence[Tensor],
        sources: ParameterSources,
        write: Callable[[list[wire.Chunk]], Awaitable[None]],
        limits: Limits,
    ) -> None:
        """Answer a step of a session's only worker.

        Args:
            actor: Serves the session.
            gradients: Of all parameters, in their order; being filled.
            sources: Which have begun the answer.
            write: Sends the chunks of one message.
            limits: For the size of the chunks, and the time that one may take.
        """
        self._actor = actor
        self._preview = actor.session.preview()
        self._gradients = gradients
        self._sources = sources
        self._write = write
        self._limits = limits
        self._coming = [list(reversed(pieces or ())) for pieces in self._preview.pieces]
        self._ready: deque[Piece] = deque()  # Their gradients are there.
        # How many bytes of parameters have become ready, been taken, and been sent; each is counted
        # by one thread only.
        self._ready_bytes = self._taken_bytes = self._sent_bytes = 0
        self._waiting: asyncio.Queue[_Batch | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._computed = [0] * len(gradients)  # How many elements of each parameter.
        self._changed = asyncio.Event()
        self._complete = False  # No more gradients will come.
        self._stopped = False
        self._wire_bytes = 0  # That have been sent, as they travel.
        self._computing = asyncio.create_task(self._compute())
        self._sending = asyncio.create_task(self._send())

    def received(self, position: int, element_count: int) -> None:
        """Note how many elements of a gradient are there."""
        coming = self._coming[position]
        while coming and coming[-1].last <= element_count:
            piece = coming.pop()
            self._ready.append(piece)
            self._ready_bytes += self._byte_count(piece)
            self._changed.set()

    async def finish(self) -> None:
        """Compute what is left, now that all gradients are there, as far as there is room."""
        self._complete = True
        self._changed.set()
        await self._computing

    def completed(self, contribution: Contribution) -> Contribution:
        """Return the contribution with what has become known of it on the way: after finish()."""
        sizes = (gradient.numel() for gradient in self._gradients)
        whole = all(map(operator.eq, self._computed, sizes))
        preview = self._preview if whole else None
        return dataclasses.replace(contribution, norm=self._preview.norm, preview=preview)

    @property
    def holds(self) -> bool:
        """Whether the step, which was decided, does what was sent ahead of it."""
        return self._preview.came_true

    async def rest(self, parameters: Sequence[Tensor]) -> int:
        """Send what has not been sent.

        Args:
            parameters: After the step; held still by the caller.

        Returns:
            How many bytes have been sent in all.

        Raises:
            StalledError: The client does not read.
        """
        await self.sent()
        parts = (
            self._sources.part(position, computed, parameters[position].view(-1)[computed:])
            for position, computed in enumerate(self._computed)
            if computed < parameters[position].numel()
        )
        for chunks in wire.split_parts(parts, self._limits.chunk_bytes_max):
            await transfer.in_time(self._write_counted(chunks), self._limits)
        return self._wire_bytes

    def give_up(self) -> None:
        """Send no more: what was sent is void, and some of it may still be on its way."""
        self._stopped = True
        self._changed.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing is computed or sent any more."""
        return self._computing.done() and self._sending.done()

    async def over(self) -> None:
        """Wait until what was given up is over.

        Raises:
            StalledError: The client does not read.
        """
        await self._computing
        await self.sent()

    async def cancel(self) -> None:
        """End at once: the stream has ended."""
        tasks = (self._computing, self._sending)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # A thread may be computing, in memory that was reserved for it.
        for task in tasks:
            if not task.cancelled():
                task.exception()  # Looked at, so that asyncio does not complain.

    async def _compute(self) -> None:
        try:
            while not self._stopped:
                if self._is_worth_computing():
                    if not await self._actor.preview(self._preview, self._compute_ready):
                        return
                elif self._complete:
                    return
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            self._waiting.put_nowait(None)

    def _is_worth_computing(self) -> bool:
        """Whether there is enough to compute, and room for it."""
        ready = self._ready_bytes - self._taken_bytes
        waiting = self._taken_bytes - self._sent_bytes
        enough = ready >= _BATCH_BYTES_MIN or (self._complete and ready > 0)
        return enough and waiting < _WAITING_BYTES_MAX and not self._stopped

    def _compute_ready(self) -> None:
        """Compute one batch after the other, in a thread: each way there and back takes its time.

        On a busy event loop the ways take longer than what is computed.
        """
        for _ in range(_BATCHES_AT_A_TIME):
            if not self._is_worth_computing():
                return
            pieces = self._take()
            values = self._preview.compute(
                [(piece, self._gradients[piece.position]) for piece in pieces]
            )
            with one_thread():
                parts = [
                    self._sources.part_now(piece.position, piece.first, each)
                    for piece, each in zip(pieces, values, strict=True)
                ]
            batch = _Batch(parts, sum(each.nbytes for each in values))
            self._loop.call_soon_threadsafe(self._pass_on, pieces, batch)

    def _take(self) -> list[Piece]:
        """Return the pieces of a batch."""
        pieces = [self._ready.popleft()]
        byte_count = self._byte_count(pieces[0])
        while self._ready and byte_count + self._byte_count(self._ready[0]) <= _BATCH_BYTES_MAX:
            pieces.append(self._ready.popleft())
            byte_count += self._byte_count(pieces[-1])
        self._taken_bytes += byte_count
        return pieces

    def _byte_count(self, piece: Piece) -> int:
        """Return how many bytes the elements of a parameter have, as its gradient's do."""
        return piece.element_count * self._gradients[piece.position].itemsize

    def _pass_on(self, pieces: Sequence[Piece], batch: _Batch) -> None:
        for piece in pieces:
            self._computed[piece.position] = piece.last
        self._waiting.put_nowait(batch)

    async def _send(self) -> None:
        while (batch := await self._waiting.get()) is not None:
            for chunks in wire.split_parts(batch.parts, self._limits.chunk_bytes_max):
                if self._stopped:
                    return
                # For as long as gradients come, the client may have its reasons not to read.
                await self._write_counted(chunks)
            self._sent_bytes += batch.byte_count
            self._changed.set()

    async def _write_counted(self, chunks: list[wire.Chunk]) -> None:
        await self._write(chunks)
        self._wire_bytes += sum(len(chunk.data) for chunk in chunks)

    async def sent(self) -> int:
        """Wait until what was computed is sent, for as long as it goes on; return how many bytes.

        Raises:
            StalledError: The client does not read.
        """
        while not self._sending.done():
            before = self._wire_bytes
            await asyncio.wait([self._sending], timeout=self._limits.stall_timeout_s)
            if not self._sending.done() and self._wire_bytes == before:
                raise transfer.stalled(self._limits)
        self._sending.result()
        return self._wire_bytes
