"""One run: a session, trained from its first step to its curves."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import numpy as np

from optserve_client import Client, LossHistory, LossPoint, LossResult, ParameterGroup, Session
from optserve_client.nn import CrossEntropyLoss

from .data import Examples
from .model import BIASES, WEIGHTS, backward, forward, initial_parameters
from .recipes import BATCH, WEIGHT_DECAY, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all runs have in common."""

    train: Examples
    validation: Examples
    epochs: int
    seed: int
    """Of the initial parameters and of the order of the examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands at the end of an epoch."""

    epoch: int
    train_loss: float
    """Mean over the epoch's batches."""
    validation_loss: float
    accuracy: float
    """On the validation examples, from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A loss over steps, as the server remembers it: one point for each epoch."""

    steps: list[int]
    losses: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that has come to its end."""

    recipe: Recipe
    train: Curve
    """Each point is the mean over the batches of an epoch."""
    validation: Curve
    validation_accuracy: float
    """At the end, from 0 to 1."""
    steps_per_second: float
    """Beside all the other runs. A step here evaluates a loss and updates the parameters."""

    @property
    def train_loss(self) -> float:
        """Mean over the last epoch's batches."""
        return self.train.losses[-1]

    @property
    def validation_loss(self) -> float:
        """At the end."""
        return self.validation.losses[-1]


class StoppedError(Exception):
    """The run was asked to stop before its end."""


def train(
    client: Client, recipe: Recipe, plan: Plan, report: Callable[[Progress], None], stop: Event
) -> Run:
    """Train one model as ``recipe`` says, in a session of its own.

    Args:
        client: Connected; may be shared by many runs.
        recipe: Optimizer and schedule.
        plan: Data, epochs, seed.
        report: Called at the end of every epoch.
        stop: Once set, the run ends before its next step.

    Raises:
        OptserveError: The server refused something, or is gone.
        StoppedError: ``stop`` was set.
    """
    order = np.random.default_rng(plan.seed)
    with client.create_session(
        initial_parameters(plan.seed),
        optimizer=recipe.optimizer,
        scheduler=recipe.scheduler,
        schedule_unit=recipe.unit,
        loss=CrossEntropyLoss(),
        groups=[
            ParameterGroup(
                name="weights",
                parameters=WEIGHTS,
                overrides=type(recipe.optimizer)(weight_decay=WEIGHT_DECAY),
            ),
            ParameterGroup(name="biases", parameters=BIASES),
        ],
        display_name=recipe.name,
    ) as session:
        started = time.perf_counter()
        for epoch in range(1, plan.epochs + 1):
            report(_train_epoch(session, plan, epoch, order, stop))
        seconds = time.perf_counter() - started
        validation = session.loss_points("validation")
        return Run(
            recipe=recipe,
            train=_curve(session.loss_points("train")),
            validation=_curve(validation),
            validation_accuracy=_accuracy(validation[-1]),
            steps_per_second=session.steps / seconds,
        )


def _train_epoch(
    session: Session, plan: Plan, epoch: int, order: np.random.Generator, stop: Event
) -> Progress:
    """Take a step for each batch, then look at the validation examples, and end the epoch."""
    losses = []
    for batch in plan.train.batches(BATCH, order):
        if stop.is_set():
            raise StoppedError
        hidden, logits = forward(session.parameters, batch.images)
        loss = session.evaluate_loss(logits, batch.digits, split="train")
        assert loss.gradient is not None  # It always comes with the loss of the train split.
        session.step(backward(session.parameters, batch.images, hidden, loss.gradient))
        losses.append(loss.loss)
    _, logits = forward(session.parameters, plan.validation.images)
    validation = session.evaluate_loss(logits, plan.validation.digits, split="validation")
    session.end_epoch()
    return Progress(
        epoch=epoch,
        train_loss=float(np.mean(losses)),
        validation_loss=validation.loss,
        accuracy=_accuracy(validation),
    )


def _curve(history: LossHistory) -> Curve:
    """Return one point for each epoch of the history: the mean of its losses, at its last step."""
    epochs = [list(points) for _, points in itertools.groupby(history, lambda point: point.epochs)]
    return Curve(
        steps=[points[-1].steps for points in epochs],
        losses=[float(np.mean([point.loss for point in points])) for points in epochs],
    )


def _accuracy(evaluation: LossResult | LossPoint) -> float:
    assert evaluation.accuracy is not None  # Cross entropy of digits is a classification.
    return evaluation.accuracy
