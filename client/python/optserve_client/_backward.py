"""Steps that are sent while torch's backward pass still computes their gradients."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from functools import partial

from optserve_client._channel import CLOSE_TIMEOUT_S
from optserve_client._mirror import UNSTAMPED, Mirror, Stamp
from optserve_client._under_way import StepUnderWay
from optserve_client.results import StepResult
from optserve_client.session import Session, begin_step, can_overlap


class Backward:
    """The backward pass, watched: its gradients are sent as it computes them.

    The hooks on the parameters are called by autograd's threads; they neither wait nor fail.
    """

    def __init__(self, mirrors: Mapping[str, Mirror], session: Session) -> None:
        """Watch the parameters of ``mirrors``, and take steps of ``session`` with their gradients.

        Does nothing if all gradients fit into one message.
        """
        self._mirrors = mirrors
        self._session = session
        self._lock = threading.Lock()
        self._step: StepUnderWay | None = None
        self._expected: set[str] = set()  # By the step under way.
        self._sent: dict[str, Stamp] = {}
        self._spoilt = False
        self.given_up = 0
        """How many steps that were begun came to nothing."""
        this = weakref.ref(self)  # Weakly, for a model may outlive its optimizer.
        self._hooks = {
            name: mirror.watch(partial(_accumulated, this, name))
            for name, mirror in mirrors.items()
            if mirror.is_trained and can_overlap(session)
        }

    def accumulated(self, name: str) -> None:
        """Send the gradient of a parameter. Once the step is spoilt, send no more."""
        with self._lock:
            mirror = self._mirrors[name]
            # A second one of the same parameter adds to what was sent.
            self._spoilt |= name in self._sent or not mirror.has_plain_gradient
            if self._spoilt:
                return
            if self._step is None:
                self._expected = {name for name in self._hooks if self._mirrors[name].is_trained}
                self._step = begin_step(self._session, self._expected)
            self._sent[name] = mirror.stamp()
            self._step.put(name, *mirror.start_gradient())

    def finish_step(self) -> StepResult | None:
        """End the step that the backward pass has begun, and return what it did.

        None if there is none that was begun with just the gradients that there are now.

        Raises:
            OptserveError: As of ``Session.step``.
        """
        if self._step is None or not self._is_as_sent():
            self.give_up()
            return None
        step, self._step = self._step, None
        self._forget()
        result = step.finish()
        self.given_up += result is None
        return result

    def give_up(self, patience_s: float | None = None) -> None:
        """Give up the step under way, if there is one; see ``StepUnderWay.give_up``."""
        step, self._step = self._step, None
        self._forget()
        if step is not None:
            self.given_up += 1
            step.give_up(patience_s)

    def close(self) -> None:
        """Watch no more."""
        for hook in self._hooks.values():
            hook.remove()
        self.give_up(CLOSE_TIMEOUT_S)

    def _is_as_sent(self) -> bool:
        """Return whether the gradients that were sent are those that there are."""
        return (
            not self._spoilt
            and self._sent.keys() == self._expected
            and all(
                mirror.has(self._sent.get(name, UNSTAMPED))
                for name, mirror in self._mirrors.items()
            )
        )

    def _forget(self) -> None:
        self._sent, self._spoilt = {}, False


def _accumulated(backward: weakref.ref[Backward], name: str) -> None:
    if (alive := backward()) is not None:
        alive.accumulated(name)
