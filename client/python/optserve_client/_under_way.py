"""A step that is sent while its gradients are still being computed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future

from numpy.typing import ArrayLike

from optserve_client._blocking import BlockingDriver
from optserve_client._channel import CLOSE_TIMEOUT_S
from optserve_client._feed import Feed
from optserve_client._session_operations import SessionOperations
from optserve_client.results import StepResult


class StepUnderWay:
    """A session's next step, begun before all of its gradients are there.

    It is an attempt: until ``finish`` has been called the server changes nothing, and whatever
    happens, the same step can be taken in the ordinary way instead. Between the begin and the end
    of it no other step may be taken.
    """

    def __init__(
        self, operations: SessionOperations, driver: BlockingDriver, names: Collection[str]
    ) -> None:
        """Begin the step.

        Args:
            operations: Of the session.
            driver: Performs them, from now on in another thread.
            names: Of the parameters that will have a gradient.
        """
        self._operations = operations
        self._driver = driver
        self._feed = Feed([name for name in operations.names if name in names])
        self._positions = {name: position for position, name in enumerate(self._feed.names)}
        self._outcome: Future[StepResult] = Future()
        # Also if nobody ends the step: the thread would wait for ever.
        weakref.finalize(self, self._feed.close)
        # A daemon: it must not keep an interpreter alive in which nobody ends the step.
        self._thread = threading.Thread(
            target=_take,
            args=(operations, driver, self._feed, self._outcome),
            name="optserve-step",
            daemon=True,
        )
        self._thread.start()

    def put(self, name: str, gradient: ArrayLike, wait: Callable[[], object]) -> None:
        """Send a gradient, and return before that has happened.

        Args:
            name: Of its parameter; once for each of those that the step was begun with.
            gradient: As of ``Session.step``. What changes it makes the step one to give up.
            wait: Called by another thread; returns once the gradient's values are there.

        Raises:
            RequestError: It does not fit its parameter.
        """
        position = self._positions[name]
        data = self._operations.gradient_bytes(name, gradient, position)
        self._feed.put(position, data, wait)

    def finish(self) -> StepResult | None:
        """End the step, all of whose gradients have been put, and wait until it is applied.

        Returns:
            What it did. None if it had come to nothing before it could be ended: nothing was
            changed, and the step can be taken in the ordinary way.

        Raises:
            OptserveError: As of ``Session.step``.
        """
        if self._outcome.done() or not self._feed.end():
            self.give_up()
            return None
        try:
            return self._outcome.result()
        except BaseException:
            if not self._outcome.done():  # An interrupt: nobody waits for the answer any more.
                self._feed.close()
                self._driver.end_stream()
            raise
        finally:
            self._thread.join(CLOSE_TIMEOUT_S)

    def give_up(self, patience_s: float | None = None) -> None:
        """Forget the step: the server forgets it as well, and the worker's seat is free.

        Args:
            patience_s: How long to wait for the server to say so. None: as long as for any call.
        """
        self._feed.close()
        if patience_s is None:
            patience_s = self._operations.terms.config.timeout_s
        self._thread.join(patience_s)
        self._driver.end_stream()
        self._thread.join(CLOSE_TIMEOUT_S)


def _take(
    operations: SessionOperations,
    driver: BlockingDriver,
    feed: Feed,
    outcome: Future[StepResult],
) -> None:
    try:
        outcome.set_result(driver.run(operations.step_from(feed)))
    # Of any kind: whoever finishes the step has to know.
    except BaseException as error:  # noqa: BLE001
        outcome.set_exception(error)
    finally:
        del outcome  # Else it would hold the error, whose traceback holds this frame.
