"""Bytes that are nearly right: what was valid, with a few things wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

# Where numbers end, lengths overflow, tags lie, and texts begin to be none.
_TELLING = (
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff\xff\xff\x0f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"\xff\xfe",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x0b",
    b"\xc0\x3e\x01",
)
_CHANGES_MAX = 4
_PIECE_MAX = 16


def mutated(random: Random, examples: Sequence[bytes]) -> bytes:
    """Return one of the examples with from one to four things wrong with it."""
    data = bytearray(random.choice(examples))
    for _ in range(random.randint(1, _CHANGES_MAX)):
        random.choice(_CHANGES)(random, data, examples)
    return bytes(data)


def _flip(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.randrange(256)


def _insert(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    at = random.randint(0, len(data))
    data[at:at] = random.choice(_TELLING)


def _overwrite(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    at, piece = random.randint(0, len(data)), random.choice(_TELLING)
    data[at : at + len(piece)] = piece


def _cut(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    del data[random.randint(0, len(data)) :]


def _remove(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    at = random.randint(0, len(data))
    del data[at : at + random.randint(1, _PIECE_MAX)]


def _repeat(random: Random, data: bytearray, _examples: Sequence[bytes]) -> None:
    at = random.randint(0, len(data))
    data[at:at] = data[at : at + random.randint(1, _PIECE_MAX)]


def _splice(random: Random, data: bytearray, examples: Sequence[bytes]) -> None:
    """Go on with the end of another example."""
    other = random.choice(examples)
    data[random.randint(0, len(data)) :] = other[random.randint(0, len(other)) :]


_CHANGES: Sequence[Callable[[Random, bytearray, Sequence[bytes]], None]] = (
    _flip,
    _replace,
    _insert,
    _overwrite,
    _cut,
    _remove,
    _repeat,
    _splice,
)
