"""Rules about steps: streams of workers, contributions in every form, repeats, gaps, and epochs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from drivers import wait_for_contribution
from event_loop import TIMEOUT_S
from faults.machines.modelled.ground import ANY, Ground
from faults.machines.modelled.seat import Seat, Sent, request_of
from faults.machines.modelled.service import contribution_of, rates_of
from faults.machines.modelled.session import Content, Outcome, RefusalError
from faults.machines.modelled.world import Owned
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from messages import bytes_of, chunks_of
from refusals import refused, translated
from scenarios.models import gradients
from streams import RawStream, reopened_stream

from optserve.v1 import optimizer_service_pb2 as pb

WORKERS = st.integers(0, 1)
CLIENTS = st.sampled_from([b"", b"A" * 16, b"A" * 16, b"B" * 16])
DIGESTS = st.sampled_from([b"", b"a", b"a", b"b"])
# Seeds of gradients; or what is none for every parameter, or not finite.
CONTENTS = st.sampled_from([1, 2, 3, 4, "b only", "none", "nan"])
FORMS = st.sampled_from(["chunks", "packed", "bare", "one message"])


class Chosen(NamedTuple):
    """What a contribution is made of."""

    content: int | str
    digest: bytes
    form: str


class Steps(Ground):
    """Workers that train, each as it likes."""

    @rule(number=ANY, worker=WORKERS, client_id=CLIENTS)
    @precondition(lambda self: self.world.sessions)
    def open(self, number: int, worker: int, client_id: bytes) -> None:
        tenant, session_id = self.any_session(number)
        worker %= self._workers(session_id)
        held = self.seats.get((session_id, worker))

        def modelled() -> Owned:
            found = self.world.find(tenant, session_id)
            if held and not (client_id and held.client_id == client_id):
                raise RefusalError("WORKER_BUSY")
            return found

        opened = self.agree(
            modelled, lambda: RawStream(self.driver(tenant), session_id, client_id, worker)
        )
        if opened is None:
            return
        owned, stream = opened
        if held:
            with refused("SEAT_TAKEN_OVER"):
                held.answer()
        self._check_opened(owned, worker, stream)
        self.seats[session_id, worker] = Seat(stream=stream, client_id=client_id)

    @rule(number=ANY)
    @precondition(lambda self: self.seats)
    def close(self, number: int) -> None:
        place = self._any_seat(number)
        seat = self.seats[place]
        if seat.stream and not seat.waits:
            assert seat.stream.half_close() == []
            del self.seats[place]

    @rule(number=ANY)
    @precondition(lambda self: self.seats)
    def break_off_and_come_back(self, number: int) -> None:
        session_id, worker = place = self._any_seat(number)
        owned = self.world.sessions[session_id]
        self.seats.pop(place).leave()
        with reopened_stream(self.driver(owned.tenant), session_id, worker) as stream:
            self._check_opened(owned, worker, stream)
            assert stream.half_close() == []

    @rule(number=ANY)
    @precondition(lambda self: self.seats)
    def begin_and_give_up(self, number: int) -> None:
        session_id, worker = place = self._any_seat(number)
        session, seat = self.world.sessions[session_id].session, self.seats[place]
        if seat.stream and not (seat.waits or session.unset or worker in session.round):
            seat.stream.begin(session.steps + 1, b"given up")
            seat.stream.chunks(list(chunks_of([gradients(5)["w"]])))

    @rule(number=ANY, contents=st.lists(CONTENTS, min_size=1, max_size=4), form=FORMS)
    @precondition(lambda self: self.world.sessions)
    def train(self, number: int, contents: list[int | str], form: str) -> None:
        """Take some steps, one after the other, with all workers."""
        _, session_id = self.any_session(number)
        for content in contents:
            for worker in range(self._workers(session_id)):
                self._contribute(number, worker, 0, Chosen(content, b"a", form))

    @rule(number=ANY, worker=WORKERS, content=CONTENTS, digest=DIGESTS, form=FORMS)
    @precondition(lambda self: self.world.sessions)
    def contribute(
        self, number: int, worker: int, content: int | str, digest: bytes, form: str
    ) -> None:
        self._contribute(number, worker, 0, Chosen(content, digest, form))

    @rule(number=ANY, worker=WORKERS, content=CONTENTS, digest=DIGESTS, form=FORMS)
    @precondition(lambda self: self.world.sessions)
    def contribute_again(
        self, number: int, worker: int, content: int | str, digest: bytes, form: str
    ) -> None:
        self._contribute(number, worker, -1, Chosen(content, digest, form))

    @rule(number=ANY, worker=WORKERS, turn=st.sampled_from([-2, 1]), form=FORMS)
    @precondition(lambda self: self.world.sessions)
    def lose_count(self, number: int, worker: int, turn: int, form: str) -> None:
        self._contribute(number, worker, turn, Chosen(1, b"a", form))

    @rule(number=ANY, worker=WORKERS)
    @precondition(lambda self: self.world.sessions)
    def ask(self, number: int, worker: int) -> None:
        tenant, session_id = self.any_session(number)
        worker %= self._workers(session_id)
        asked = self.agree(
            lambda: self.world.find(tenant, session_id),
            lambda: self.driver(tenant).contribution(session_id, worker),
        )
        if asked is None:
            return
        owned, answer = asked
        session = owned.session
        self.check_status(answer.status, owned)
        assert contribution_of(answer) == session.contributions[worker]
        assert answer.HasField("result") == bool(session.last and worker not in session.round)
        if answer.HasField("result"):
            assert session.last is not None
            _check_result(answer.result, session.last)

    @rule(number=ANY, turn=st.sampled_from([0, 0, 0, -1, 1, -2]))
    @precondition(lambda self: self.world.sessions)
    def end_epoch(self, number: int, turn: int) -> None:
        tenant, session_id = self.any_session(number)
        owned = self.world.sessions.get(session_id)
        epoch = max(0, (owned.session.epochs if owned else 0) + 1 + turn)

        def modelled() -> Owned:
            found = self.world.find(tenant, session_id)
            self.changing(found, lambda: found.session.end_epoch(epoch))
            return found

        ended = self.agree(modelled, lambda: self.driver(tenant).end_epoch(session_id, epoch))
        if ended:
            self.check_status(ended[1], ended[0])

    def _contribute(self, number: int, worker: int, turn: int, chosen: Chosen) -> None:
        """Contribute to the next step, or to one that stands ``turn`` behind or before it."""
        tenant, session_id = self.any_session(number)
        worker %= self._workers(session_id)
        owned = self.world.sessions.get(session_id)
        step = max(0, (owned.session.steps if owned else 0) + 1 + turn)
        sent = Sent(
            step=step, content=_content(chosen.content), digest=chosen.digest, form=chosen.form
        )
        held = self.seats.get((session_id, worker))
        if owned is None or (held and (held.waits or chosen.form == "one message")):
            request = request_of(session_id, worker, sent)
            with refused("WORKER_BUSY" if owned else "SESSION_NOT_FOUND"), translated():
                self.driver(tenant).stub.Step(request, timeout=TIMEOUT_S)
            return
        self.world.find(tenant, session_id)
        again = worker in owned.session.round and step == owned.session.steps + 1
        if again and held is None and owned.session.wanted.is_patient:
            return  # Nothing would tell when the server has it.
        seat = held or Seat()
        seat.send(self.driver(tenant), session_id, worker, sent)
        seat.again = again
        self._hear(owned, (session_id, worker), seat, sent)

    def _hear(self, owned: Owned, place: tuple[str, int], seat: Seat, sent: Sent) -> None:
        """Look at what comes of a contribution, for its worker and for those who wait for it."""
        (session_id, worker), session = place, owned.session
        became: tuple[Outcome, bool] | str | None
        try:
            became = self.changing(
                owned,
                lambda: session.contribute(
                    worker, sent.step, sent.content, sent.digest, bare=sent.is_bare
                ),
            )
        except RefusalError as refusal:
            became = refusal.reason
        if became is None and session.wanted.is_patient:
            self.seats[place], seat.waits = seat, True
            if not seat.again:
                told = session.contributions[worker]
                assert told is not None
                wanted = pb.Contribution(step=told.step, digest=told.digest)
                wait_for_contribution(self.driver(owned.tenant), session_id, wanted, worker)
            return
        self._check_answer(owned, seat, became or "ROUND_TIMEOUT")
        for (other_id, other), waiting in list(self.seats.items()):
            if other_id == session_id and waiting.waits and other not in session.round:
                assert became is not None
                self._check_answer(owned, waiting, became)
                if waiting.stream is None:
                    del self.seats[other_id, other]

    def _check_answer(self, owned: Owned, seat: Seat, expected: tuple[Outcome, bool] | str) -> None:
        """Look whether a contribution is answered as it must be, or refused."""
        if isinstance(expected, str):
            with refused(expected):
                seat.answer()
            return
        outcome, replayed = expected
        may_be_late = seat.again
        result, parameters = seat.answer()
        _check_result(result, outcome)
        assert result.replayed == replayed or may_be_late
        assert parameters == [bytes_of(value) for value in owned.session.values.values()]

    def _check_opened(self, owned: Owned, worker: int, stream: RawStream) -> None:
        self.check_status(stream.status, owned)
        assert contribution_of(stream.opened) == owned.session.contributions[worker]

    def _any_seat(self, number: int) -> tuple[str, int]:
        return list(self.seats)[number % len(self.seats)]

    def _workers(self, session_id: str) -> int:
        owned = self.world.sessions.get(session_id)
        return owned.session.wanted.workers if owned else 1


def _check_result(result: pb.StepResult, outcome: Outcome) -> None:
    assert (result.step, result.epochs) == (outcome.step, outcome.epochs)
    assert rates_of(result) == outcome.rates
    both_nan = math.isnan(result.gradient_norm) and math.isnan(outcome.norm)
    assert both_nan or math.isclose(result.gradient_norm, outcome.norm, rel_tol=1e-6)


def _content(chosen: int | str) -> Content:
    if isinstance(chosen, int):
        return gradients(chosen)
    whole = gradients(6)
    contents: dict[str, Content] = {
        "b only": {"b": whole["b"]},
        "none": {},
        "nan": {**whole, "b": torch.full_like(whole["b"], math.nan)},
    }
    return contents[chosen]
