"""Traffic: how many calls may go on at once, and how many a tenant may begin in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from optserve_server.core.errors import RateExceededError, TooManyError
from optserve_server.core.limits import Limits

_RETRY_AFTER_S = 5.0  # Streams and calls end when those who have them are done.
_IDLE_BUCKETS_MAX = 1_000  # A full bucket says as much as none.


class Traffic:
    """Lets calls in. Everything is called on the event loop."""

    def __init__(self, limits: Limits, monotonic: Callable[[], float]) -> None:
        """Let in what ``limits`` allow.

        Args:
            limits: In force.
            monotonic: Seconds, from any beginning.
        """
        self._limits = limits
        self._monotonic = monotonic
        self._buckets: dict[str, TokenBucket] = {}
        self.calls = 0
        """How many calls with one message each way go on."""
        self.streams = 0
        """How many streams are open."""

    def begin(self, tenant: str) -> None:
        """Note that a tenant begins a call.

        Raises:
            RateExceededError: It has begun as many as it may.
        """
        rate = self._limits.request_rate_max
        if not rate:
            return
        wait_s = self._bucket(tenant).take()
        if wait_s:
            raise RateExceededError(
                f"a tenant may begin {rate:g} calls in a second; try again in {wait_s:.3g} s",
                expected=f"at most {rate:g} calls in a second",
                retry_after_s=wait_s,
            )

    @contextmanager
    def call(self) -> Iterator[None]:
        """Let a call with one message each way go on for a block.

        Raises:
            TooManyError: As many as allowed go on.
        """
        self._check(self.calls, self._limits.calls_max, "calls going on", "calls")
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Let a stream be open for a block.

        Raises:
            TooManyError: As many as allowed are open.
        """
        self._check(self.streams, self._limits.streams_max, "streams open", "streams")
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def _check(self, count: int, most: int, what: str, noun: str) -> None:
        if count >= most:
            raise TooManyError(
                f"there are {count} {what}, which is as many as allowed; try again later",
                expected=f"at most {most} {noun}",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _bucket(self, tenant: str) -> TokenBucket:
        if len(self._buckets) > _IDLE_BUCKETS_MAX and tenant not in self._buckets:
            self._buckets = {name: each for name, each in self._buckets.items() if not each.is_full}
        if tenant not in self._buckets:
            self._buckets[tenant] = TokenBucket(self._limits.request_rate_max, self._monotonic)
        return self._buckets[tenant]


class TokenBucket:
    """Holds a second's worth of tokens, at least one, and is filled at a rate."""

    def __init__(self, rate: float, monotonic: Callable[[], float]) -> None:
        """Begin full.

        Args:
            rate: Tokens that come in a second.
            monotonic: Seconds, from any beginning.
        """
        self._rate = rate
        self._most = max(1.0, rate)
        self._monotonic = monotonic
        self._tokens = self._most
        self._filled_s = monotonic()

    @property
    def is_full(self) -> bool:
        """Whether nobody has taken a token of late."""
        self._fill()
        return self._tokens >= self._most

    def take(self) -> float:
        """Take a token, and return 0.0; or take none, and return in how many seconds to."""
        self._fill()
        if self._tokens < 1.0:
            return (1.0 - self._tokens) / self._rate
        self._tokens -= 1.0
        return 0.0

    def _fill(self) -> None:
        now_s = self._monotonic()
        self._tokens = min(self._most, self._tokens + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
