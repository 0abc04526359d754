"""How long, and how often, what came to nothing is tried again: without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from optserve_client import _outages
from optserve_client._effects import Operation, Pause
from optserve_client._outages import Outages
from optserve_client.config import Retry
from optserve_client.errors import (
    ClosedError,
    DeadlineError,
    InternalError,
    LimitError,
    OptserveError,
    RoundTimeoutError,
    SeatTakenOverError,
    ShapeMismatchError,
    StalledError,
    UnavailableError,
    WorkerBusyError,
)

SECURE = Retry(jitter=0, backoff_s=1, backoff_factor=3, backoff_max_s=10, give_up_after_s=60)


class Clock:
    """A clock that stands still, unless somebody pauses."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_outages, "time", clock)
    return clock


def failing(errors: Iterator[OptserveError]) -> Callable[[], Operation[str]]:
    """Return what makes attempts that come to these errors, one after the other."""

    def attempt() -> Operation[str]:
        yield from ()  # It asks nobody, and is an operation all the same.
        for error in errors:
            raise error
        return "done"

    return attempt


def pauses(operation: Operation[str], clock: Clock) -> Iterator[float]:
    """Yield how long each pause of an operation is, and let the time pass."""
    while isinstance(effect := next(operation, None), Pause):
        clock.now_s += effect.seconds
        yield effect.seconds


def test_waits_grow_up_to_a_bound(clock: Clock) -> None:
    attempt = failing(iter([UnavailableError("gone")] * 5))
    assert list(pauses(Outages("x", SECURE).persist(attempt), clock)) == [1, 3, 9, 10, 10]


def test_a_server_that_says_when_to_come_back_is_not_asked_before(clock: Clock) -> None:
    errors = [LimitError("full", retry_after_s=7), UnavailableError("drains", retry_after_s=5)]
    attempt = failing(iter(errors))
    assert list(pauses(Outages("x", SECURE).persist(attempt), clock)) == [7 + 1, 5 + 3]


def test_it_ends_when_the_time_is_up(clock: Clock) -> None:
    attempt = failing(itertools.repeat(UnavailableError("gone")))
    waited = pauses(Outages("x", SECURE).persist(attempt), clock)
    with pytest.raises(UnavailableError):
        list(waited)
    assert 150 < clock.now_s < 160


def test_the_time_is_that_of_outages_and_not_of_what_lay_between_them(clock: Clock) -> None:
    reached_s: list[float] = []

    def attempt() -> Operation[str]:
        yield from ()
        reached_s.append(clock.now_s)
        clock.now_s += 1_000  # The stream was open for so long.
        raise UnavailableError("gone")

    operation = Outages("x", SECURE).persist(attempt, reached_s=lambda: reached_s[-1])
    waited = pauses(operation, clock)
    # As many as if each attempt had failed at once.
    assert list(itertools.islice(waited, 7)) == [1, 3, 9, 10, 10, 10, 10]
    with pytest.raises(UnavailableError):
        next(waited)


@pytest.mark.parametrize("jitter", [0.25, 1.0])
def test_part_of_a_wait_is_left_to_chance(jitter: float, clock: Clock) -> None:
    chancy = Retry(jitter=jitter, backoff_s=1, backoff_factor=1, give_up_after_s=1e6)
    attempt = failing(iter([UnavailableError("gone")] * 200))
    waits = list(pauses(Outages("x", chancy).persist(attempt), clock))
    assert len(waits) == 200
    assert 1 - jitter <= min(waits) < 1 - 0.9 * jitter
    assert 1 - 0.1 * jitter < max(waits) <= 1


FINAL = [
    *(ShapeMismatchError("no"), InternalError("oh"), DeadlineError("late"), ClosedError("closed")),
    *(WorkerBusyError("busy"), SeatTakenOverError("taken"), LimitError("too large")),
    RoundTimeoutError("nobody came", retry_after_s=0.0),
]


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
def test_what_is_final_is_told_at_once(error: OptserveError, clock: Clock) -> None:
    with pytest.raises(type(error)):
        next(Outages("x", SECURE).persist(failing(iter([error]))))
    assert clock.now_s == 100


@pytest.mark.parametrize("error", [UnavailableError("gone"), StalledError("slow")], ids=str)
def test_who_never_tries_again_is_told_at_once(error: OptserveError, clock: Clock) -> None:
    with pytest.raises(type(error)):
        next(Outages("x", Retry.never()).persist(failing(iter([error]))))
    assert clock.now_s == 100
