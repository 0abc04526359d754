"""Encoded tensors where steps are answered ahead: the bytes of an answer after the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from faults.overlapping import World, adam_spec, gradients, model, overlapping
from streams import Answer, RawStream
from torch import Tensor

from optserve.encodings import encoded_bytes
from optserve.v1.session_pb2 import SessionSpec, Wire
from optserve.v1.tensor_pb2 import Encoding, TensorChunk, TensorChunks
from optserve_server.core.encodings import CODECS
from optserve_server.core.spec import Encoding as CoreEncoding
from optserve_server.core.surroundings import Overlap

BLOCKS = Encoding.ENCODING_INT8_BLOCKS
CODEC_OF = {
    Encoding.ENCODING_BF16: CODECS[CoreEncoding.BF16],
    Encoding.ENCODING_FP16: CODECS[CoreEncoding.FP16],
    BLOCKS: CODECS[CoreEncoding.INT8_BLOCKS],
}
IDS = {"bf16": Encoding.ENCODING_BF16, "fp16": Encoding.ENCODING_FP16, "int8-blocks": BLOCKS}
STEPS = 5
CHUNK_BYTES = 100_003  # Which cuts elements and blocks.
REST = 4  # Messages that are held back.


@pytest.fixture(scope="module")
def worlds() -> Iterator[tuple[World, World]]:
    """Serve once with answers ahead, and once without."""
    with ExitStack() as stack:
        yield (
            stack.enter_context(overlapping()),
            stack.enter_context(overlapping(overlap=Overlap.OFF)),
        )


def _spec(encoding: Encoding.ValueType) -> SessionSpec:
    spec = adam_spec()
    spec.wire.CopyFrom(Wire(gradients=encoding, parameters=encoding))
    return spec


def _messages(tensors: Sequence[Tensor], encoding: Encoding.ValueType) -> list[TensorChunks]:
    messages = []
    for position, tensor in enumerate(tensors):
        data = torch.empty(encoded_bytes(encoding, tensor.numel()), dtype=torch.uint8)
        if tensor.numel():
            CODEC_OF[encoding].encode(tensor.reshape(-1), data)
        whole = data.numpy().tobytes()
        for at in range(0, len(whole), CHUNK_BYTES):
            piece = whole[at : at + CHUNK_BYTES]
            chunk = TensorChunk(tensor=position, offset=at, data=piece)
            messages.append(TensorChunks(chunks=[chunk]))
    return messages


def _step(stream: RawStream, step: int, encoding: Encoding.ValueType, *, ahead: bool) -> Answer:
    messages = _messages(gradients(step), encoding)
    stream.begin(step)
    stream.chunks(messages[:-REST])
    if ahead:
        stream.receive_ahead()
    stream.chunks(messages[-REST:])
    stream.end()
    answer = stream.answer()
    assert answer.refusal is None
    return answer


@dataclass(slots=True)
class View:
    """What a client knows of the parameters."""

    values: list[Tensor]

    def take(self, answer: Answer) -> float:
        """Take an answer; return how far the parameters have moved at most."""
        before = [each.clone() for each in self.values]
        for position, data in answer.parameters.items():
            flat = self.values[position].view(-1)
            came = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if answer.encoding == Encoding.ENCODING_UNSPECIFIED:
                flat.copy_(came.view(torch.float32))
            else:
                differences = torch.empty_like(flat)
                CODEC_OF[BLOCKS].decode(came, differences)
                flat.add_(differences)
        moved = [(a - b).abs().max() for a, b in zip(self.values, before, strict=True) if a.numel()]
        return max(each.item() for each in moved)


@pytest.mark.parametrize("encoding", IDS.values(), ids=IDS)
def test_the_bytes_are_the_same_ahead_and_after(
    worlds: tuple[World, World], encoding: Encoding.ValueType
) -> None:
    ahead, after = worlds
    with (
        ahead.session(_spec(encoding)) as one_id,
        after.session(_spec(encoding)) as other_id,
        ahead.stream(one_id) as one,
        after.stream(other_id) as other,
    ):
        for step in range(1, STEPS + 1):
            answer = _step(one, step, encoding, ahead=True)
            expected = _step(other, step, encoding, ahead=False)
            assert (answer.begins, answer.encoding) == (1, expected.encoding)
            assert answer.parameters == expected.parameters
            assert answer.result == expected.result


def _refused_at_the_end(stream: RawStream, step: int) -> None:
    spoilt = [gradient.clone() for gradient in gradients(step)]
    spoilt[-1][-1] = torch.nan
    messages = _messages(spoilt, BLOCKS)
    stream.begin(step)
    stream.chunks(messages[:-1])
    stream.receive_ahead()
    stream.chunks(messages[-1:])
    stream.end()
    refusal = stream.answer().refusal
    assert refusal is not None
    assert refusal.reason == "NON_FINITE_GRADIENT"


def _given_up(stream: RawStream, step: int) -> None:
    stream.begin(step)
    stream.chunks(_messages(gradients(step), BLOCKS)[:-REST])
    stream.receive_ahead()


@pytest.mark.parametrize("disturb", [_refused_at_the_end, _given_up], ids=["refused", "given-up"])
def test_differences_go_on_from_what_a_client_really_has(
    worlds: tuple[World, World], disturb: Callable[[RawStream, int], None]
) -> None:
    ahead, after = worlds
    view = View(list(model().values()))
    with (
        ahead.session(_spec(BLOCKS)) as one_id,
        after.session(_spec(BLOCKS)) as other_id,
        ahead.stream(one_id) as one,
        after.stream(other_id) as other,
    ):
        for step in range(1, STEPS + 1):
            disturbed = step == 3
            if disturbed:
                disturb(one, step)
            answer = _step(one, step, BLOCKS, ahead=not disturbed)
            _step(other, step, BLOCKS, ahead=False)
            # What was taken back may have come in part: nothing is built on it.
            plain = step == 1 or disturbed
            assert (answer.encoding == Encoding.ENCODING_UNSPECIFIED) == plain
            moved = view.take(answer)
            stored = list(ahead.driver.download(one_id).values())
            undisturbed = list(after.driver.download(other_id).values())
            for seen, exact, wanted in zip(view.values, stored, undisturbed, strict=True):
                assert torch.equal(exact, wanted)
                error = (seen - exact).abs().max().item() if exact.numel() else 0.0
                assert error <= (0.0 if plain else moved / 127 * 0.51 + 1e-6)
