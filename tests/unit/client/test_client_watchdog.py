from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from optserve_client._watchdog import Watchdog


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


def test_what_takes_too_long_is_cancelled(watchdog: Watchdog) -> None:
    cancelled = threading.Event()
    with watchdog.limit(0.02, cancelled.set) as deadline:
        assert cancelled.wait(5)
    assert deadline.expired


def test_what_is_in_time_is_not_cancelled(watchdog: Watchdog) -> None:
    cancelled = threading.Event()
    with watchdog.limit(0.05, cancelled.set) as deadline:
        pass
    assert not cancelled.wait(0.2)
    assert not deadline.expired


def test_a_deadline_that_is_nearer_than_the_one_before_is_kept(watchdog: Watchdog) -> None:
    far, near = threading.Event(), threading.Event()
    with watchdog.limit(60, far.set), watchdog.limit(0.02, near.set):
        assert near.wait(5)
        assert not far.is_set()


def test_a_deadline_after_an_idle_time_is_kept(watchdog: Watchdog) -> None:
    with watchdog.limit(0.01, lambda: None):
        pass
    time.sleep(0.05)  # The thread has looked, found nothing, and sleeps without end.
    cancelled = threading.Event()
    with watchdog.limit(0.02, cancelled.set):
        assert cancelled.wait(5)


def test_its_thread_ends_when_it_is_closed(watchdog: Watchdog) -> None:
    with watchdog.limit(60, lambda: None):
        (thread,) = [each for each in threading.enumerate() if each.name == "optserve-deadlines"]
    watchdog.close()
    thread.join(5)
    assert not thread.is_alive()
