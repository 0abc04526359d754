"""Rules about the lives of sessions: made, changed, evaluated, looked at, forgotten."""

from __future__ import annotations

import torch
from drivers import Evaluation
from faults.durable import JOURNAL, snapshots
from faults.machines.modelled.ground import ANY, OWNERS, REQUEST_IDS, Ground
from faults.machines.modelled.service import points
from faults.machines.modelled.session import (
    GROUPS,
    IMPATIENT_S,
    LOSSES,
    OPTIMIZERS,
    PATIENT_S,
    RefusalError,
    Session,
    Wanted,
)
from faults.machines.modelled.world import Owned
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from messages import bytes_of, header_of, messages_of
from parity.cases import choose
from refusals import refused
from scenarios.models import EPOCHS_UNIT, STEPS_UNIT, gradients, model

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.session_pb2 import (
    NON_FINITE_POLICY_ALLOW,
    NON_FINITE_POLICY_REFUSE,
    NON_FINITE_POLICY_UNSPECIFIED,
    SPLIT_TRAIN,
    SPLIT_UNSPECIFIED,
    SPLIT_VALIDATION,
    Durability,
    NonFinitePolicy,
    ParameterGroup,
    Split,
)

RATES = st.sampled_from([0.5, 0.25, 0.125])
SPLITS = st.sampled_from([SPLIT_TRAIN, SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_UNSPECIFIED])
WANTED = st.builds(
    Wanted,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    lr=RATES,
    unit=st.sampled_from([None, STEPS_UNIT, EPOCHS_UNIT]),
    loss=st.sampled_from([None, *LOSSES]),
    workers=st.integers(1, 2),
    durability=st.sampled_from([JOURNAL, JOURNAL, snapshots(2), Durability()]),
    patience_s=st.sampled_from([PATIENT_S, PATIENT_S, IMPATIENT_S]),
)


class Lives(Ground):
    """Sessions of two tenants."""

    @rule(
        wanted=WANTED,
        owner=OWNERS,
        request_id=REQUEST_IDS,
        with_values=st.sampled_from([True, True, False]),
    )
    def create(self, wanted: Wanted, owner: str, request_id: str, with_values: bool) -> None:
        values = model() if with_values else {}
        session = Session(wanted)
        if values:
            session.set_values(values)
        request = pb.CreateSessionRequest(
            spec=wanted.spec, values=messages_of(values), request_id=request_id
        )
        self.make(owner, request, lambda: session)

    @rule(number=ANY)
    @precondition(lambda self: self.world.requests)
    def repeat_a_request(self, number: int) -> None:
        made = list(self.world.requests.items())
        (owner, _), (request, session_id) = made[number % len(made)]
        self.make(owner, request, self.world.sessions[session_id].session.kept)

    @rule(number=ANY)
    @precondition(lambda self: self.world.sessions)
    def look_at(self, number: int) -> None:
        tenant, session_id = self.any_session(number)
        if session_id in self.world.sessions:
            self.check_session(session_id)
            return
        with refused("SESSION_NOT_FOUND"):
            self.driver(tenant).get(session_id)

    @rule(
        number=ANY,
        names=st.sets(st.sampled_from(["w", "b"]), min_size=1),
        seed=st.integers(7, 9),
        fits=st.sampled_from([True, True, False]),
    )
    @precondition(lambda self: self.world.sessions)
    def upload(self, number: int, names: set[str], seed: int, fits: bool) -> None:
        tenant, session_id = self.any_session(number)
        values = {name: value for name, value in gradients(seed).items() if name in names}

        def modelled() -> Owned:
            found = self.world.find(tenant, session_id)
            if not fits:
                raise RefusalError("SHAPE_MISMATCH")
            self.changing(found, lambda: found.session.set_values(values))
            return found

        sent = values if fits else {**values, "b": torch.zeros(4)}
        set_ = self.agree(modelled, lambda: self.driver(tenant).upload(session_id, sent))
        if set_:
            self.check_status(set_[1], set_[0])

    @rule(
        number=ANY,
        rates=st.dictionaries(st.sampled_from(list(GROUPS)), RATES),
        momentum=st.sampled_from([None, None, 0.5, 0.0]),
        loss=st.sampled_from([None, *LOSSES]),
        non_finite=st.sampled_from(
            [
                NON_FINITE_POLICY_UNSPECIFIED,
                NON_FINITE_POLICY_REFUSE,
                NON_FINITE_POLICY_ALLOW,
            ]
        ),
        display_name=st.sampled_from([None, "", "a name"]),
    )
    @precondition(lambda self: self.world.sessions)
    def update(
        self,
        number: int,
        rates: dict[str, float],
        momentum: float | None,
        loss: str | None,
        non_finite: NonFinitePolicy.ValueType,
        display_name: str | None,
    ) -> None:
        tenant, session_id = self.any_session(number)
        owned = self.world.sessions.get(session_id)
        kind = OPTIMIZERS[owned.session.wanted.optimizer if owned else "SGD"]
        request = pb.UpdateSessionRequest(
            session_id=session_id,
            optimizer=choose(Optimizer(), SGD(momentum=momentum)) if momentum is not None else None,
            groups=[
                ParameterGroup(name=group, overrides=choose(Optimizer(), kind(lr=rate)))
                for group, rate in rates.items()
            ],
            loss=choose(Loss(), LOSSES[loss][0]) if loss else None,
            non_finite=non_finite,
            display_name=display_name,
        )

        def modelled() -> Owned:
            found = self.world.find(tenant, session_id)
            self.changing(
                found,
                lambda: found.session.update(
                    rates=rates,
                    momentum=momentum,
                    loss=loss,
                    non_finite=non_finite,
                    display_name=display_name,
                ),
            )
            return found

        updated = self.agree(modelled, lambda: self.driver(tenant).update(request))
        if updated:
            self.check_status(updated[1].status, updated[0])

    @rule(number=ANY, seed=st.integers(1, 3), split=SPLITS, streams=st.booleans())
    @precondition(lambda self: self.world.sessions)
    def evaluate(self, number: int, seed: int, split: Split.ValueType, streams: bool) -> None:
        tenant, session_id = self.any_session(number)
        predictions, targets = gradients(seed)["b"], gradients(seed + 1)["b"]

        def modelled() -> tuple[torch.Tensor, torch.Tensor]:
            found = self.world.find(tenant, session_id)
            return self.changing(found, lambda: found.session.evaluate(predictions, targets, split))

        def real() -> Evaluation:
            driver = self.driver(tenant)
            if not streams:
                return driver.evaluate(session_id, predictions, targets, split=split, gradient=True)
            begin = pb.LossBegin(
                session_id=session_id,
                split=split,
                gradient=True,
                predictions=header_of("predictions", predictions),
                targets=header_of("targets", targets),
            )
            return driver.evaluate_stream(begin, [predictions, targets])

        evaluated = self.agree(modelled, real)
        if evaluated:
            (loss, gradient), came = evaluated
            assert came.result.loss == loss.item()
            assert came.result.steps == self.world.sessions[session_id].session.steps
            assert came.gradient is not None
            assert bytes_of(came.gradient) == bytes_of(gradient)
            session = self.world.sessions[session_id].session
            assert points(self.driver(tenant), session_id, split) == session.points(split)

    @rule(number=ANY)
    @precondition(lambda self: len(self.world.sessions) > 1)
    def delete(self, number: int) -> None:
        tenant, session_id = self.any_session(number)
        held = [place for place in self.seats if place[0] == session_id]
        owned = self.world.sessions.get(session_id)
        deleted = self.agree(
            lambda: self.world.delete(tenant, session_id),
            lambda: self.driver(tenant).delete(session_id),
        )
        for place in held:
            with refused("SESSION_DELETED"):
                self.seats.pop(place).answer()
        if deleted and owned and not owned.stale:
            assert deleted[1].steps == deleted[0].steps
