"""Calls are let in at a rate, as many at once, and each tenant for itself."""

from __future__ import annotations

import pytest

from optserve_server.core.errors import RateExceededError, TooManyError
from optserve_server.core.limits import Limits
from optserve_server.core.traffic import Traffic


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_second_s_worth_may_come_at_once_and_then_one_after_the_other() -> None:
    clock = Clock()
    traffic = Traffic(Limits(request_rate_max=4), clock)
    for _ in range(4):
        traffic.begin("a")
    with pytest.raises(RateExceededError) as caught:
        traffic.begin("a")
    assert caught.value.retry_after_s == 0.25
    clock.now_s += 0.25
    traffic.begin("a")
    with pytest.raises(RateExceededError):
        traffic.begin("a")
    clock.now_s += 1_000  # A long pause is worth no more than a second.
    for _ in range(4):
        traffic.begin("a")
    with pytest.raises(RateExceededError):
        traffic.begin("a")


def test_a_rate_below_one_lets_one_through_at_a_time() -> None:
    clock = Clock()
    traffic = Traffic(Limits(request_rate_max=0.1), clock)
    traffic.begin("a")
    clock.now_s += 4
    with pytest.raises(RateExceededError) as caught:
        traffic.begin("a")
    assert caught.value.retry_after_s == pytest.approx(6)
    clock.now_s += 6.001
    traffic.begin("a")


def test_a_tenant_s_rate_is_its_own() -> None:
    traffic = Traffic(Limits(request_rate_max=1), Clock())
    traffic.begin("a")
    traffic.begin("b")
    with pytest.raises(RateExceededError):
        traffic.begin("a")


def test_tenants_that_pause_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    traffic = Traffic(Limits(request_rate_max=1), clock)
    for number in range(2_000):
        traffic.begin(f"gone-{number}")
    clock.now_s += 1
    traffic.begin("busy")
    for number in range(500):
        traffic.begin(f"new-{number}")
    with pytest.raises(RateExceededError):
        traffic.begin("busy")
    assert len(traffic._buckets) < 1_000


def test_without_a_rate_nobody_waits() -> None:
    traffic = Traffic(Limits(), Clock())
    for _ in range(10_000):
        traffic.begin("a")


def test_calls_and_streams_are_counted_each_for_themselves_and_given_back() -> None:
    traffic = Traffic(Limits(calls_max=1, streams_max=1), Clock())
    for _ in range(2):
        with traffic.call(), traffic.stream():
            with pytest.raises(TooManyError, match="1 calls"), traffic.call():
                pass
            with pytest.raises(TooManyError, match="1 streams"), traffic.stream():
                pass
            assert (traffic.calls, traffic.streams) == (1, 1)
    assert (traffic.calls, traffic.streams) == (0, 0)
