"""What an operation asks of the network, and nothing of how that is done.

An operation is a generator: it yields effects, is sent what came of each, or has thrown into it why
nothing did, and returns its result. So every operation is written once, and two drivers perform it:
one blocking, one for asyncio.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from optserve.wire import Chunk
from optserve_client._exchange import Opening, TrainExchange

Event: TypeAlias = Message | list[Chunk]
"""What a stream of tensors carries."""

_Answer = TypeVar("_Answer", bound=Message)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Call an rpc that answers with one message, which is what came of it."""

    rpc: str
    request: Message | Iterator[Event]
    """One message, or those of a stream."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Call an rpc that answers with a stream; hand each message to ``receive`` until it ends."""

    rpc: str
    request: Message | Iterator[Event]
    """One message, or those of a stream."""
    receive: Callable[[Any], None]
    """Takes the rpc's responses; what it raises ends the call."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """See to it that the worker's long-lived stream is open: if it is not, open it."""

    opening: Opening
    """Has the answer, if the stream was opened with it."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Converse:
    """Hold ``exchange`` on the worker's stream, as it was opened last.

    Whatever is thrown into the operation has ended it.
    """

    exchange: TrainExchange
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Do nothing for a while."""

    seconds: float


Effect: TypeAlias = Ask | Collect | Open | Converse | Pause

Operation: TypeAlias = Generator[Effect, Message | None, _Result]
"""Yields effects, is sent the answer of an Ask and None otherwise, and returns the result."""


def ask(
    rpc: str, request: Message | Iterator[Event], answer: type[_Answer], timeout_s: float
) -> Operation[_Answer]:
    """Call an rpc, and return its one answer."""
    response = yield Ask(rpc=rpc, request=request, timeout_s=timeout_s)
    assert isinstance(response, answer)
    return response
