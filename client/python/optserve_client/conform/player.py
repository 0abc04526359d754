"""Plays the acts of one scenario, with the client's public API."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import optserve_client as optserve
from optserve_client.conform import documents
from optserve_client.conform.checkpoint_file import checkpoint_document
from optserve_client.conform.documents import Document, MisspeltError

_ARRIVAL_GAP_S = 0.05  # Between two contributions of a round, so that they arrive in their order.


class ProblemError(Exception):
    """An act did not come out as it must."""


class Player:
    """One scenario. Leaving its block closes the streams, and deletes sessions and checkpoints."""

    def __init__(self, client: optserve.Client) -> None:
        self._client = client
        self._sessions: dict[str, optserve.Session] = {}
        self._seats: dict[tuple[str, int], optserve.Session] = {}
        self._saved: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for seat in self._seats.values():
            seat.close()
        for session in self._sessions.values():
            with suppress(optserve.SessionNotFoundError):
                session.delete()
        for session_id, name in self._saved:
            with suppress(optserve.CheckpointNotFoundError):
                self._client.delete_checkpoint(session_id, name)

    def play(self, act: Document) -> None:
        """Play one act.

        Raises:
            ProblemError: Something else came than must come, or the act is not known.
        """
        keys = {key: value for key, value in act.items() if key not in {"act", "expect", "refused"}}
        play = self._acts().get(act["act"])
        if play is None:
            raise ProblemError("there is no such act")
        try:
            inspect.signature(play).bind(**keys)
        except TypeError as error:
            raise ProblemError(str(error)) from error
        outcomes = self._round(**keys) if act["act"] == "round" else [_outcome(play, keys)]
        for outcome in outcomes:
            _compare(act, outcome)

    def _acts(self) -> Mapping[str, Callable[..., object]]:
        return {
            "server_info": self._server_info,
            "catalogue": self._catalogue,
            "create_session": self._create_session,
            "get_session": self._get_session,
            "update_session": self._update_session,
            "delete_session": self._delete_session,
            "list_sessions": self._list_sessions,
            "upload_parameters": self._upload_parameters,
            "download_parameters": self._download_parameters,
            "join": self._join,
            "leave": self._leave,
            "step": self._step,
            "round": self._round,
            "end_epoch": self._end_epoch,
            "evaluate_loss": self._evaluate_loss,
            "list_loss_points": self._list_loss_points,
            "save_checkpoint": self._save_checkpoint,
            "list_checkpoints": self._list_checkpoints,
            "restore_checkpoint": self._restore_checkpoint,
            "download_checkpoint": self._download_checkpoint,
            "delete_checkpoint": self._delete_checkpoint,
        }

    def _server_info(self) -> Document:
        return documents.document(self._client.server_info())

    def _catalogue(self) -> Document:
        return documents.document(self._client.catalogue())

    def _create_session(self, *, session: str, spec: Document) -> Document:
        rest = {key: part for key, part in spec.items() if key != "parameters"}
        made = self._client.create_session(
            documents.parameters(spec["parameters"]), **documents.options(rest)
        )
        self._sessions[session] = made
        return documents.document(self._client.get_session(made.session_id))

    def _get_session(self, *, session: str = "", session_id: str = "") -> Document:
        wanted = session_id or self._sessions[session].session_id
        return documents.document(self._client.get_session(wanted))

    def _update_session(self, *, session: str, update: Document) -> Document:
        changed = self._sessions[session].update(**documents.options(update))
        return documents.document(changed)

    def _delete_session(self, *, session: str) -> Document:
        # By its id: the session object stays open, and shows how a deleted session refuses.
        return documents.document(self._client.delete_session(self._sessions[session].session_id))

    def _list_sessions(self, *, page_size: int = 0) -> Document:
        mine = {session.session_id for session in self._sessions.values()}
        found = self._client.list_sessions(page_size=page_size)
        return {
            "sessions": [
                documents.document(status) for status in found if status.session_id in mine
            ]
        }

    def _upload_parameters(self, *, session: str, parameters: Sequence[Document]) -> Document:
        return documents.document(self._sessions[session].upload(documents.arrays(parameters)))

    def _download_parameters(self, *, session: str, names: Sequence[str] | None = None) -> Document:
        found = self._sessions[session].download(names)
        return {"steps": found.steps, "parameters": _tensors(found)}

    def _join(self, *, session: str, worker: int = 0) -> Document:
        seat = self._new_seat(session, worker)
        try:
            status = seat.open()
        except optserve.OptserveError:
            seat.close()
            raise
        self._seats[session, worker] = seat
        return documents.document(status)

    def _leave(self, *, session: str, worker: int = 0) -> Document:
        self._seats.pop((session, worker)).close()
        return {}

    def _step(
        self,
        *,
        session: str,
        gradients: Sequence[Document],
        worker: int = 0,
        step: int | None = None,
        via: optserve.Via = "stream",
    ) -> Document:
        seat = self._seats.get((session, worker))
        if seat is None:
            seat = self._seats[session, worker] = self._new_seat(session, worker)
        result = seat.step(documents.arrays(gradients), step=step, via=via)
        return {
            "step": result.step,
            "epochs": result.epochs,
            "rates": result.rates,
            "gradient_norm": result.gradient_norm,
            "replayed": result.replayed,
            "parameters": _tensors(seat.parameters),
        }

    def _round(
        self, *, session: str, contributions: Sequence[Document], step: int | None = None
    ) -> list[Document]:
        with ThreadPoolExecutor(max_workers=len(contributions)) as threads:
            pending = []
            for contribution in contributions:
                keys = {"session": session, "step": step, **contribution}
                pending.append(threads.submit(_outcome, self._step, keys))
                time.sleep(_ARRIVAL_GAP_S)
            return [outcome.result() for outcome in pending]

    def _end_epoch(self, *, session: str, epoch: int | None = None) -> Document:
        return documents.document(self._sessions[session].end_epoch(epoch=epoch))

    def _evaluate_loss(
        self,
        *,
        session: str,
        predictions: Document,
        targets: Document,
        split: str | None = None,
        gradient: bool | None = None,
        via: optserve.Via | None = None,
    ) -> Document:
        result = self._sessions[session].evaluate_loss(
            documents.array(predictions),
            documents.array(targets),
            split=_SPLITS[split],
            gradient=gradient,
            via=via,
        )
        tensors = {"gradient": result.gradient, "elements": result.elements}
        return {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "steps": result.steps,
            **{
                name: None if values is None else documents.tensor_document(values)
                for name, values in tensors.items()
            },
        }

    def _list_loss_points(
        self, *, session: str, split: str | None = None, page_size: int = 0
    ) -> Document:
        history = self._sessions[session].loss_points(_SPLITS[split], page_size=page_size)
        return {
            "forgotten": history.forgotten,
            "points": [
                {
                    "sequence": point.sequence,
                    "split": point.split.upper(),
                    "steps": point.steps,
                    "epochs": point.epochs,
                    "loss": point.loss,
                    "accuracy": point.accuracy,
                }
                for point in history
            ],
        }

    def _save_checkpoint(self, *, session: str, name: str) -> Document:
        saved = self._sessions[session].save_checkpoint(name)
        self._saved.add((saved.session_id, name))
        return documents.document(saved)

    def _list_checkpoints(self, *, session: str | None = None, page_size: int = 0) -> Document:
        wanted = None if session is None else self._sessions[session].session_id
        found = self._client.checkpoints(wanted, page_size=page_size)
        mine = {session_id for session_id, _ in self._saved}
        return {
            "checkpoints": [documents.document(each) for each in found if each.session_id in mine]
        }

    def _restore_checkpoint(
        self, *, session: str, name: str, restored: str, display_name: str | None = None
    ) -> Document:
        made = self._client.restore_checkpoint(
            self._sessions[session].session_id, name, display_name=display_name
        )
        self._sessions[restored] = made
        return documents.document(self._client.get_session(made.session_id))

    def _download_checkpoint(self, *, session: str, name: str) -> Document:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.safetensors"
            saved = self._client.download_checkpoint(self._sessions[session].session_id, name, path)
            return {"checkpoint": documents.document(saved), **checkpoint_document(path)}

    def _delete_checkpoint(self, *, session: str, name: str) -> Document:
        session_id = self._sessions[session].session_id
        return documents.document(self._client.delete_checkpoint(session_id, name))

    def _new_seat(self, session: str, worker: int) -> optserve.Session:
        session_id = self._sessions[session].session_id
        return self._client.join_session(session_id, worker=worker, download=False)


_SPLITS: dict[str | None, optserve.Split | None] = {
    None: None,
    "TRAIN": "train",
    "VALIDATION": "validation",
}


def _tensors(parameters: optserve.Parameters) -> list[Document]:
    return [documents.tensor_document(values, name) for name, values in parameters.items()]


def _outcome(play: Callable[..., object], keys: Document) -> Document:
    """Play an act, and return its answer, or how it was refused."""
    try:
        return {"answer": play(**keys)}
    except optserve.OptserveError as error:
        facts = ("reason", "field", "expected", "actual")
        return {
            "refused": {fact: getattr(error, fact) for fact in facts},
            "message": str(error),
        }
    except MisspeltError as error:
        return {"refused": {"reason": "UNKNOWN_FIELD", "field": ""}, "message": str(error)}


def _compare(act: Document, outcome: Document) -> None:
    if "refused" not in act:
        if "answer" not in outcome:
            raise ProblemError(f"it was refused: {outcome['message']} {outcome['refused']}")
        problem = documents.mismatch(act["expect"], outcome["answer"])
    elif "refused" not in outcome:
        raise ProblemError("it was not refused")
    else:
        wanted: dict[str, Any] = dict(act["refused"])
        word = wanted.pop("names", "")
        problem = documents.mismatch(wanted, outcome["refused"])
        if problem is None and word not in outcome["message"] + outcome["refused"]["field"]:
            problem = f"nothing names {word!r}"
        if problem is not None:
            problem += f" ({outcome['message']})"
    if problem is not None:
        raise ProblemError(problem)
