"""A session of the blocking face."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, Unpack

from numpy.typing import ArrayLike

from optserve.v1.checkpoint_pb2 import Checkpoint
from optserve.v1.session_pb2 import Session as SessionMessage
from optserve.v1.session_pb2 import SessionStatus
from optserve_client._blocking import BlockingDriver
from optserve_client._checkpoint_operations import CheckpointOperations
from optserve_client._loss_operations import evaluate_loss, loss_points
from optserve_client._session_operations import Gradients, SessionOperations
from optserve_client._session_view import SessionView
from optserve_client._spec import UpdateOptions, Via
from optserve_client._under_way import StepUnderWay
from optserve_client.errors import OptserveError, SessionNotFoundError
from optserve_client.results import (
    Contribution,
    LossHistory,
    LossResult,
    Parameters,
    Split,
    StepResult,
)
from optserve_client.tensors import Array


class Session(SessionView):
    """One session, as one of its workers takes part in it. For one thread at a time.

    As a context manager it is closed at the end of the block, and deleted if this client has
    created it.
    """

    def __init__(
        self, operations: SessionOperations, driver: BlockingDriver, *, created: bool
    ) -> None:
        """Take part through ``operations``; if it was ``created`` here, its block deletes it."""
        super().__init__(operations)
        self._driver = driver
        self._created = created

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._created or self._driver.closed:
            self.close()
            return
        # What went wrong first is what the caller has to see; and what is gone need not be deleted.
        with suppress(SessionNotFoundError if kind is None else OptserveError):
            self._delete(persist=kind is None)

    def open(self) -> SessionStatus:
        """Open this worker's stream now, not with its first step, and learn where the session is.

        Raises:
            WorkerBusyError: Somebody else is this worker.
        """
        return self._driver.run(self._operations.open())

    def step(
        self, gradients: Gradients, *, step: int | None = None, via: Via | None = None
    ) -> StepResult:
        """Apply one optimizer step, then advance the scheduler; ``parameters`` are new afterwards.

        With several workers it waits for the others: the step is applied with the mean of all
        gradients.

        Args:
            gradients: By parameter; same shape and data type. One that is None, or not there, is no
                gradient, which is not a gradient of zeros: parameter and optimizer state stay as
                they are. Nothing is converted. Must not change until the call returns.
            step: Number of the step, from 1. None: the one after the last step that was answered.
            via: How this step travels. None: as the session was made or joined. No unary step is
                taken for a worker whose stream is open: one call at a time sends for each.

        Returns:
            What the step did, with the learning rates used *by* it.

        Raises:
            RequestError: A gradient does not fit its parameter, or is not finite. Nothing was
                changed.
            SessionError: The session cannot step now. Nothing was changed; see the class.
            StepsLostError: The server has lost steps: ``resume()``, and repeat their data.
            StepUnknownError: No answer came for as long as ``ClientConfig.retry`` says. Take the
                same step again, or ask ``contribution()``: it is applied once, if at all.
            ServiceError: It could not be sent, or the server is at fault.
        """
        return self._driver.run(self._operations.step(gradients, step=step, via=via))

    def contribution(self) -> Contribution:
        """Ask what became of the last step that this worker has sent, from whatever client."""
        return self._driver.run(self._operations.contribution())

    def resume(self) -> Parameters:
        """Go on from where the session stands, whatever was known of it here.

        For a worker that steps were lost of, and for one that takes the place of another. A step
        that waits for the other workers, and has this worker's gradients, is waited for.

        Returns:
            The newest parameters, whose ``steps`` are the session's: the next step is one more.

        Raises:
            OptserveError: As of ``step`` and ``download``.
        """
        return self._driver.run(self._operations.resume())

    def gradient_buffers(self) -> dict[str, Array]:
        """Return writable arrays for gradients, by parameter: always the same ones.

        A step with these very arrays copies nothing where the server shares its memory (see
        ``ClientConfig.lane``); elsewhere they are arrays like others. Not to be written to during a
        step; undefined after it. A server that has started anew shares other memory: ask again
        after ``resume()``.
        """
        return self._driver.run(self._operations.gradient_buffers())

    def end_epoch(self, *, epoch: int | None = None) -> SessionStatus:
        """End an epoch: a scheduler that counts epochs advances.

        Args:
            epoch: Number of the epoch that ends, from 1; to end the last one again changes nothing.
                None: the one after the last that is known here to have ended.

        Raises:
            EpochEmptyError: The epoch has no step.
        """
        return self._driver.run(self._operations.end_epoch(epoch))

    def evaluate_loss(
        self,
        predictions: ArrayLike,
        targets: ArrayLike,
        *,
        split: Split | None = None,
        gradient: bool | None = None,
        via: Via | None = None,
    ) -> LossResult:
        """Evaluate the session's loss.

        Args:
            predictions: Of the model, in the shape that the loss asks for.
            targets: That belong to them, in the shape and data type that the loss asks for.
            split: Where to keep the result in the session's history. None: nowhere.
            gradient: Whether to compute the gradient with respect to the predictions. None: for
                "train" only.
            via: In one message each way, or in a stream of its own. None: by size.

        Raises:
            LossNotSetError: The session has no loss.
            RequestError: Predictions or targets do not fit the loss.
        """
        return self._driver.run(
            evaluate_loss(
                self._operations, predictions, targets, split=split, gradient=gradient, via=via
            )
        )

    def loss_points(self, split: Split | None = None, *, page_size: int = 0) -> LossHistory:
        """Read all the evaluations that the session keeps, the oldest first.

        Args:
            split: Of which split. None: of both.
            page_size: How many to ask for at once. Zero: as many as the server gives.
        """
        return self._driver.run(loss_points(self._operations, split, page_size))

    def status(self) -> SessionStatus:
        """Ask where the session stands."""
        return self._driver.run(self._operations.status())

    def update(self, **changes: Unpack[UpdateOptions]) -> SessionMessage:
        """Change hyperparameters, the loss or the name: all that is given, or nothing.

        A new ``lr`` is what the next step uses; the schedule goes on from there in proportion.

        Returns:
            The session with everything that is in force.
        """
        return self._driver.run(self._operations.update(**changes))

    def upload(self, values: Mapping[str, ArrayLike]) -> SessionStatus:
        """Set values of parameters: all of these, or none. The optimizer's state stays."""
        return self._driver.run(self._operations.upload(values))

    def download(self, names: Sequence[str] | None = None) -> Parameters:
        """Fetch values of parameters as they are between two steps.

        Args:
            names: Which ones. None: all; they also become ``parameters``, and ``steps`` what they
                belong to.
        """
        return self._driver.run(self._operations.download(names))

    def save_checkpoint(self, name: str) -> Checkpoint:
        """Save the session as it is between two steps, under a name; return what was saved.

        It outlives the session: see ``Client.restore_checkpoint`` and
        ``Client.download_checkpoint``. Saved once more where nothing has changed since, it is the
        checkpoint that is there.

        Raises:
            CheckpointExistsError: The session has one of this name, of another state.
            NoStorageError: The server keeps sessions in memory only.
            LimitError: There are as many as allowed, or the server's disk is full. Nothing was
                saved.
        """
        operations = CheckpointOperations(self._operations.terms)
        return self._driver.run(operations.save(self._operations.session_id, name))

    def delete(self) -> SessionStatus:
        """Make the server forget the session, for everybody, and return where it stood.

        Of a session whose deletion was answered only after the connection had broken, that is its
        id alone.
        """
        return self._delete(persist=True)

    def close(self) -> None:
        """End this worker's stream. The session lives on. May be called again."""
        self._driver.close()

    def _delete(self, *, persist: bool) -> SessionStatus:
        self._driver.end_stream()
        try:
            return self._driver.run(self._operations.delete(persist=persist))
        finally:
            self.close()


# The asyncio face has no such things, and so the session shows no methods for them.


def can_overlap(session: Session) -> bool:
    """Return whether it pays to begin steps: their gradients do not fit into one message."""
    return session._operations.overlaps  # noqa: SLF001


def begin_step(session: Session, names: Collection[str]) -> StepUnderWay:
    """Begin a session's next step before its gradients are there; see ``StepUnderWay``.

    Args:
        session: Nobody may take another step in it before this one has been ended or given up.
        names: Of the parameters that will have a gradient.
    """
    return StepUnderWay(session._operations, session._driver, names)  # noqa: SLF001
