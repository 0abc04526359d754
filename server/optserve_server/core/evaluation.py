"""EvaluateLoss on a session that serves others too: computed beside them, then kept."""

from __future__ import annotations

from torch import Tensor

from optserve_server.core.actor import SessionActor
from optserve_server.core.events import LossEvaluated
from optserve_server.core.history import LossPoint
from optserve_server.core.losses import LossOutcome
from optserve_server.core.spec import Split


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
    session = actor.session
    if actor.archive:  # Between two steps, where it has a place among the changes.
        async with actor.writing():
            await actor.make(lambda: session.add_point(_point(actor, split, outcome)))
    else:
        session.add_point(_point(actor, split, outcome))


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
