"""A round: the contributions of all workers that make one step."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core.errors import OptserveError, StepConflictError
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.preview import Preview
from optserve_server.core.staging import Loading

_NARROW = (torch.float16, torch.bfloat16)


class Round:
    """Contributions by worker, and what becomes of them."""

    def __init__(self, workers: int, step: int) -> None:
        """Wait for ``workers`` contributions to ``step``. Made on the event loop."""
        loop = asyncio.get_running_loop()
        self.step = step
        self._contributions: list[Contribution | None] = [None] * workers
        self.digests = [b""] * workers
        """What identifies the content of each contribution; empty where no digest was sent."""
        self.norm: float | None = None
        """The mean's, if it is known."""
        self.arrivals_s: list[float] = []
        """When each contribution came."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when no contribution is waited for any more: all are there, or it was abandoned."""
        self.preview: Preview | None = None
        """What has computed the whole step ahead of it, if anything has."""
        self.decided: asyncio.Future[StepOutcome] = loop.create_future()
        """What the step does, or why it is not made. Done with ``done``, or before it."""
        self.done: asyncio.Future[StepOutcome] = loop.create_future()
        """What the step did, or why it was not made."""
        for future in (self.decided, self.done):
            future.add_done_callback(_retrieve)

    def has(self, worker: int) -> bool:
        """Return whether the worker has contributed."""
        return self._contributions[worker] is not None

    @property
    def missing(self) -> list[int]:
        """Workers that have not contributed."""
        return [worker for worker, each in enumerate(self._contributions) if each is None]

    def add(self, contribution: Contribution, time_s: float) -> None:
        """Take a worker's gradients, which stay as they are until the round is done."""
        self._contributions[contribution.worker] = contribution
        self.digests[contribution.worker] = contribution.digest
        if len(self.digests) == 1:
            self.norm, self.preview = contribution.norm, contribution.preview
        self.arrivals_s.append(time_s)
        if not self.missing:
            self.closed.set_result(None)

    def abandon(self, error: OptserveError) -> None:
        """Tell those who wait that there will be no step, unless all have contributed already."""
        if not self.closed.done():
            self.closed.set_result(None)
            self.refuse(error)

    def decide(self, outcome: StepOutcome) -> None:
        """Tell those who need nothing but the outcome that nothing can refuse the step any more."""
        self.decided.set_result(outcome)

    def settle(self, outcome: StepOutcome) -> None:
        """Tell those who wait that the step has been made."""
        for future in (self.decided, self.done):
            if not future.done():
                future.set_result(outcome)

    def refuse(self, error: Exception) -> None:
        """Tell those who wait that the step has not been made, or has failed half way."""
        for future in (self.decided, self.done):
            if not future.done():
                future.set_exception(error)

    def mean(self, *, into: Sequence[Tensor] = ()) -> list[Tensor | None]:
        """Return the mean of the contributions, on the device; consumes them.

        For each parameter the gradients are added in the order of the workers, whatever the order
        of their arrival, and the sum is divided by the number of workers. A gradient that only some
        of them have counts as zeros for the others, as in torch's DistributedDataParallel; one that
        nobody has stays absent.

        Args:
            into: One for each parameter, on the device, for the result to lie in. Empty: it lies
                in memory of the contributions.
        """
        contributions = [each.loaded() for each in self._contributions if each is not None]
        targets = into or itertools.repeat(None)
        return [
            _mean(gradients, len(contributions), target)
            for target, *gradients in zip(targets, *contributions, strict=False)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One worker's gradients for one step, being received."""

    worker: int
    step: int
    digest: bytes
    """What identifies its content, if that is known already; empty: nothing."""
    gradients: Sequence[Tensor | None]
    """On the CPU, one for each parameter of the session; None where there is none."""
    targets: Sequence[Tensor]
    """The same tensors in the order in which they were announced, to be filled."""
    loading: Loading | None = None
    """What brings them to the session's device, and is told as they come. None: they are there."""
    norm: float | None = None
    """Euclidean norm of the gradients, if it is known; see norm_of()."""
    preview: Preview | None = None
    """What has computed the whole step ahead of it: nobody needs the session to know its outcome.
    """
    settled: Round | StepOutcome | None
    """What answers it already, so that what is sent again is not to be stored.

    A round that has it, or the last step.
    """

    def loaded(self) -> Sequence[Tensor | None]:
        """Return the gradients on the session's device, for computations that are asked for now."""
        if self.loading is None:
            return self.gradients
        loaded = self.loading.finish()
        return [loaded.get(position) for position in range(len(self.gradients))]

    def check_digest(self) -> None:
        """Make sure that what is sent again is what was sent first, as far as anybody can tell.

        Raises:
            StepConflictError: It is something else.
        """
        if self.settled is None or not self.digest:
            return
        first = self.settled.digests[self.worker]
        if first and first != self.digest:
            raise StepConflictError(
                f"worker {self.worker} has contributed to step {self.step} already, with another"
                " digest; this content is not applied: download the parameters, and go on from"
                " where the session stands",
                field="digest",
                expected=first.hex(),
                actual=self.digest.hex(),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LastContribution:
    """The last step that a worker has contributed to."""

    step: int
    digest: bytes
    """What identifies its content; empty: no digest was sent."""
    outcome: StepOutcome | None
    """What the step did. None: it waits for other workers, or for its turn to be applied."""


def _mean(gradients: Sequence[Tensor | None], workers: int, target: Tensor | None) -> Tensor | None:
    first: Tensor | None = None
    for gradient in gradients:
        if gradient is None:
            continue
        if first is None:
            # In the target, if there is one, no client can write to it any more.
            first = gradient if target is None else target.copy_(gradient)
            # A sum of FP16 overflows where its mean does not. The memory is that of a norm's copy.
            total = first.float() if first.dtype in _NARROW and workers > 1 else first
        else:
            total.add_(gradient)
    if first is None or workers == 1:
        return first
    total.div_(workers)
    return total if total is first else first.copy_(total)


def _retrieve(done: asyncio.Future[StepOutcome]) -> None:
    """Look at the outcome, so that asyncio does not complain when every worker has gone."""
    if not done.cancelled():
        done.exception()
