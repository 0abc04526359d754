"""The tensors of a step as the session's encodings have them: gradients out, parameters in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from xxhash import xxh3_128

from optserve.encodings import PIECE_ELEMENTS, DecodingTarget, EncodingSource
from optserve.v1.tensor_pb2 import Encoding
from optserve.wire import Buffer, Source, Target
from optserve_client._digest import DigestedBuffer, StepDigest
from optserve_client._encodings import CODECS, Codec, Floats, Int8Blocks
from optserve_client.errors import ProtocolError
from optserve_client.tensors import Array

PLAIN = Encoding.ENCODING_UNSPECIFIED
INT8_BLOCKS = Encoding.ENCODING_INT8_BLOCKS


class GradientSources:
    """The gradients of one worker's steps, one step after the other.

    INT8 rounds much away: it is kept, and added to the next gradient of the same parameter. A step
    that is taken again, for nobody knows whether it was applied, is sent with the same bytes.
    """

    def __init__(self, encoding: Encoding.ValueType) -> None:
        """Send in ``encoding``."""
        self._encoding = encoding
        self._kept: dict[str, Floats] = {}
        self._next: dict[str, Floats] = {}
        """What is kept instead, once the step that is under way has been applied."""
        self._spare: dict[str, Floats] = {}
        self._step = 0  # The one that is under way.
        self._applied = 0  # The last one of which what it rounded away is kept.

    def of(
        self,
        step: int,
        digest: StepDigest,
        names: Sequence[str],
        gradients: Sequence[memoryview],
    ) -> list[Source]:
        """Return the sources of a step's gradients, to be read once, from the front.

        Args:
            step: Its number.
            digest: Takes the gradients while they are read.
            names: Of the parameters that have one.
            gradients: Their bytes, in the parameters' own data type. Must not change until the step
                is over.
        """
        source_of = self.begin(step, digest)
        return [source_of(*each) for each in zip(names, gradients, strict=True)]

    def begin(self, step: int, digest: StepDigest) -> Callable[[str, memoryview], Source]:
        """Return what gives the source of each of a step's gradients, in any order; see ``of``.

        For one thread at a time.
        """
        if self._encoding == PLAIN:
            return lambda name, gradient: DigestedBuffer(gradient, digest.part(name))
        if self._encoding == INT8_BLOCKS and step > self._applied:
            if self._step < step:  # The one before was applied, or this one could not be taken.
                self.answered(self._step)
            # A step that failed may still be read by its stream's thread: it keeps its own memory.
            self._step, self._next = step, {}
            return partial(self._compensated, _Feedback(), self._next, digest)
        codec = CODECS[self._encoding]()
        return lambda name, gradient: _source(
            self._encoding, codec, _floats(gradient), digest.part(name)
        )

    def answered(self, step: int) -> None:
        """Keep what the step has rounded away, for the next one."""
        if step != self._step or step <= self._applied:
            return
        for name, lost in self._next.items():
            if name in self._kept:
                self._spare[name] = self._kept[name]
            self._kept[name] = lost
        self._next, self._applied = {}, step

    def _compensated(
        self,
        sender: _Feedback,
        following: dict[str, Floats],
        digest: StepDigest,
        name: str,
        data: memoryview,
    ) -> Source:
        gradient, kept, part = _floats(data), self._kept.get(name), digest.part(name)
        lost = self._spare.pop(name, None)
        if lost is None:
            lost = np.empty_like(gradient)
        following[name] = lost

        def encode(first: int, last: int, data: memoryview) -> None:
            before = None if kept is None else kept[first:last]
            part.update(gradient[first:last].data)
            sender.encode(gradient[first:last], before, lost[first:last], data)

        return EncodingSource(INT8_BLOCKS, len(gradient), encode)


class _Feedback:
    """Sends what was lost before along with what is there now."""

    def __init__(self) -> None:
        self._codec = Int8Blocks()
        self._sums = np.empty(PIECE_ELEMENTS, np.float32)

    def encode(self, gradient: Floats, kept: Floats | None, lost: Floats, data: memoryview) -> None:
        """Encode the sum of ``gradient`` and ``kept``, and write to ``lost`` what it loses."""
        sums, encoded = self._sums[: len(gradient)], np.frombuffer(data, np.uint8)
        with np.errstate(all="ignore"):  # A gradient that is not finite is for the server to judge.
            if kept is None:
                np.copyto(sums, gradient)
            else:
                np.add(gradient, kept, out=sums)
            self._codec.encode(sums, encoded)
            self._codec.decode(encoded, lost)
            np.subtract(sums, lost, out=lost)
            if np.isnan(lost.max()):  # A block that was sent as NaNs.
                lost[np.isnan(lost)] = 0


def parameter_targets(
    encoding: Encoding.ValueType, buffers: Sequence[Buffer], reference: Sequence[Array] | None
) -> Sequence[Target]:
    """Return what fills buffers with an answer's parameters, once.

    Args:
        encoding: As the answer says it.
        buffers: For the parameters, in their own data type.
        reference: The parameters of the answer before on the stream, in other memory. None: there
            was none.

    Raises:
        ProtocolError: The encoding is not one that can come here.
    """
    if encoding == PLAIN:
        return buffers
    values = [np.frombuffer(buffer.view, "<f4") for buffer in buffers]
    if encoding == INT8_BLOCKS and reference is not None:
        bases = [each.reshape(-1) for each in reference]
        return [_difference_target(*each) for each in zip(values, bases, strict=True)]
    if encoding not in CODECS or encoding == INT8_BLOCKS:
        raise ProtocolError(
            f"the server's parameters have encoding {encoding}, which cannot come here"
        )
    codec = CODECS[encoding]()
    return [_target(encoding, codec, each) for each in values]


def _floats(data: memoryview) -> Floats:
    return np.frombuffer(data, "<f4")


def _source(encoding: Encoding.ValueType, codec: Codec, values: Floats, part: xxh3_128) -> Source:
    def encode(first: int, last: int, data: memoryview) -> None:
        part.update(values[first:last].data)
        codec.encode(values[first:last], np.frombuffer(data, np.uint8))

    return EncodingSource(encoding, len(values), encode)


def _target(encoding: Encoding.ValueType, codec: Codec, values: Floats) -> Target:
    def decode(first: int, last: int, data: memoryview) -> None:
        codec.decode(np.frombuffer(data, np.uint8), values[first:last])

    return DecodingTarget(encoding, len(values), decode)


def _difference_target(values: Floats, base: Floats) -> Target:
    codec = Int8Blocks()

    def decode(first: int, last: int, data: memoryview) -> None:
        piece = values[first:last]
        codec.decode(np.frombuffer(data, np.uint8), piece)
        with np.errstate(all="ignore"):
            np.add(base[first:last], piece, out=piece)

    return DecodingTarget(INT8_BLOCKS, len(values), decode)
