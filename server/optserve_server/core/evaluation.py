"""EvaluateLoss on a session that serves others too: computed beside them, then kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from optserve_server.core.actor import SessionActor
from optserve_server.core.events import LossEvaluated
from optserve_server.core.history import LossPoint
from optserve_server.core.losses import LossOutcome
from optserve_server.core.spec import Split
from optserve_server.core.work import to_its_end


async def evaluate(
    actor: SessionActor,
    split: Split,
    predictions: Tensor,
    targets: Tensor,
    *,
    with_gradient: bool,
) -> LossOutcome:
    """Compute a session's loss, beside whatever else goes on; see Session.evaluate.

    Raises:
        OptserveError: It cannot be computed, or its point of the history cannot be kept.
    """
    actor.check_open()
    session = actor.session
    with actor.in_use():
        outcome = await actor.work.run(
            lambda: session.evaluate(predictions, targets, with_gradient=with_gradient)
        )
        await actor.made()  # The answer says after how many steps it is.
        if split is not Split.NONE:
            await _add_point(actor, split, outcome)
    actor.surroundings.observer.loss_evaluated(
        LossEvaluated(
            session_id=actor.session_id,
            split=split,
            loss=outcome.loss,
            accuracy=outcome.accuracy,
        )
    )
    return outcome


async def _add_point(actor: SessionActor, split: Split, outcome: LossOutcome) -> None:
    """Keep a point of the history, whose memory is the session's from then on.

    Raises:
        MemoryExhaustedError: There is none for it.
    """
    if not actor.archive:
        with _grown(actor, split):
            actor.session.add_point(_point(actor, split, outcome))
        return

    async def add() -> None:  # Between two steps, where it has a place among the changes.
        async with actor.writing() as session:
            with _grown(actor, split):
                await actor.make(lambda: session.add_point(_point(actor, split, outcome)))

    await to_its_end(actor.work.spawn(add()))


@contextmanager
def _grown(actor: SessionActor, split: Split) -> Iterator[None]:
    """Reserve the memory of one point more, for good unless the block raises."""
    growth = actor.session.history.growth(split)
    actor.budget.reserve(growth, what="a point of the history", field="split")
    try:
        yield
    except BaseException:
        actor.budget.release(growth)
        raise
    actor.reserved_bytes += growth


def _point(actor: SessionActor, split: Split, outcome: LossOutcome) -> LossPoint:
    return LossPoint(
        sequence=actor.session.history.count + 1,
        split=split,
        steps=actor.view.steps,
        epochs=actor.view.epochs,
        loss=outcome.loss,
        accuracy=outcome.accuracy,
        time_s=actor.surroundings.clock(),
    )
