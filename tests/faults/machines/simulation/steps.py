"""Steps as events of a stream, in every form that the contract has, and their answers."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import torch
from faults.machines.history import Tensors
from messages import bytes_of, headers_of, messages_of
from refusals import RefusedError

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.wire import Chunk

Event = pb.TrainRequest | list[Chunk]


def events_of(
    random: Random,
    step: int,
    digest: bytes,
    gradients: Tensors,
    *,
    without_content: bool = False,
) -> Iterator[Event]:
    """Yield a step as a worker sends it, in a form of chance.

    Args:
        random: Chooses the form, where the digest stands, and how chunks are cut.
        step: Its number.
        digest: Of its content.
        gradients: For every parameter.
        without_content: Whether to leave out what the server has already.
    """
    data = [bytes_of(gradient) for gradient in gradients.values()]
    if not without_content and random.random() < 0.4:
        packed = pb.PackedStep(step=step, gradients=data, digest=digest)
        yield pb.TrainRequest(packed=packed)
        return
    place = "begin" if without_content else random.choice(["begin", "end", "both"])
    begin = pb.StepBegin(step=step, digest=b"" if place == "end" else digest)
    if random.random() < 0.5:
        begin.every_parameter = True
    else:
        begin.gradients.extend(headers_of(gradients))
    yield pb.TrainRequest(begin=begin)
    if not without_content:
        yield from _chunks(random, data)
    yield pb.TrainRequest(end=pb.StepEnd(digest=b"" if place == "begin" else digest))


def _chunks(random: Random, data: Sequence[bytes]) -> Iterator[list[Chunk]]:
    """Yield the chunks, in one message or in several."""
    chunks = []
    for tensor, whole in enumerate(data):
        cut = random.randint(1, len(whole))
        parts = [(0, whole[:cut]), (cut, whole[cut:])]
        chunks += [Chunk(tensor, at, memoryview(part)) for at, part in parts if part]
    at = random.randint(1, len(chunks))
    yield chunks[:at]
    if chunks[at:]:
        yield chunks[at:]


def request_of(step: int, digest: bytes, gradients: Tensors) -> pb.StepRequest:
    """Return a step in one message; whose it is, is left to the caller."""
    return pb.StepRequest(step=step, digest=digest, gradients=messages_of(gradients))


def spoiled(random: Random, gradients: Tensors) -> Tensors:
    """Return gradients of which one element is a NaN or an infinity."""
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    victim = random.choice(list(copies.values())).view(-1)
    victim[random.randrange(victim.numel())] = random.choice([math.nan, math.inf, -math.inf])
    return copies


async def answer_of(
    initial: Tensors, receive: Callable[[], Awaitable[Any]]
) -> tuple[pb.StepResult, Tensors]:
    """Receive the answer to a step: what it did, and the parameters after it.

    Args:
        initial: Parameters of the same names and shapes.
        receive: Waits for the next message; None at the end of the call.

    Raises:
        RefusedError: The step was refused.
    """
    chunks: list[Chunk] = []
    while True:
        message = await receive()
        if isinstance(message, list):
            chunks += message
            continue
        assert message is not None, "the call has ended in the middle of an answer"
        match message.WhichOneof("event"):
            case "begin":
                chunks = []
            case "refused":
                raise RefusedError.from_message(message.refused.refusal)
            case "result":
                return message.result, named(initial, gathered(chunks))
            case "packed":
                data = {i: bytearray(each) for i, each in enumerate(message.packed.parameters)}
                return message.packed.result, named(initial, data)
            case other:
                raise AssertionError(other)


def gathered(chunks: Sequence[Chunk]) -> dict[int, bytearray]:
    """Return the bytes of tensors by position."""
    came: dict[int, bytearray] = {}
    for chunk in chunks:
        assert chunk.offset == len(came.setdefault(chunk.tensor, bytearray()))
        came[chunk.tensor] += chunk.data
    return came


def named(initial: Tensors, came: Mapping[int, bytearray]) -> Tensors:
    """Return tensors that came as bytes, by the names of those that they take the place of."""
    return {
        name: torch.frombuffer(came[position], dtype=value.dtype).view(value.shape)
        for position, (name, value) in enumerate(initial.items())
    }
