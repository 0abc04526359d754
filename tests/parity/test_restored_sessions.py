"""A session that is captured, written as JSON, and restored goes on bit for bit as it would have.

For every row of the tables, with epochs, losses and gaps among the gradients; and a session that is
replayed from the records of its changes comes to the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from messages import bytes_of
from parity.cases import OPTIMIZERS, SCHEDULERS, OptimizerCase, SchedulerCase
from parity.trajectories import SMALL, gradients_of_steps, initial_parameters, spec_of
from torch import Tensor

from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.tensor_pb2 import DATA_TYPE_FP32, TensorHeader
from optserve.v1.tensor_pb2 import Tensor as TensorMessage
from optserve_server.core.changes import Change, replay, to_record
from optserve_server.core.device import Device
from optserve_server.core.history import HistoryState, LossPoint
from optserve_server.core.limits import Limits
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.session import Session
from optserve_server.core.spec import Split
from optserve_server.core.state import to_snapshot, to_state
from optserve_server.core.storage import Record, Snapshot
from optserve_server.rpc import decode_spec

STEPS, CAPTURED_AFTER = 30, 13
WEIGHT = torch.tensor([0.1, float("nan"), 3e-40])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a run has shown."""

    outcomes: list[StepOutcome]
    parameters: list[dict[str, bytes]]
    history: HistoryState


def _session(optimizer: OptimizerCase, scheduler: SchedulerCase | None) -> Session:
    wanted = spec_of(optimizer, scheduler, groups=2)
    header = TensorHeader(data_type=DATA_TYPE_FP32, shape=WEIGHT.shape)
    weight = TensorMessage(header=header, data=bytes_of(WEIGHT))
    wanted.loss.cross_entropy_loss.CopyFrom(CrossEntropyLoss(weight=weight))
    session = Session(decode_spec.session_spec(wanted, Limits()), Device("cpu"), Limits())
    session.set_parameters(dict(enumerate(initial_parameters().values())))
    return session


def _run(session: Session, scheduler: SchedulerCase | None, first: int, last: int) -> _Run:
    outcomes, parameters = [], []
    names = list(SMALL.shapes)
    for step in range(first, last + 1):
        given = gradients_of_steps()[step - 1]
        gradients = [given[name].clone() if name in given else None for name in names]
        outcomes.append(session.step(gradients, [step.to_bytes(2, "big")]))
        values = zip(names, session.parameters, strict=True)
        parameters.append({name: bytes_of(value) for name, value in values})
        session.add_point(_point(session, step))
        if scheduler and scheduler.counts_epochs and step % SMALL.epoch_steps == 0:
            session.end_epoch(step // SMALL.epoch_steps)
    return _Run(outcomes=outcomes, parameters=parameters, history=session.history.capture())


def _point(session: Session, step: int) -> LossPoint:
    return LossPoint(
        sequence=session.history.count + 1,
        split=Split.TRAIN if step % 3 else Split.VALIDATION,
        steps=step,
        epochs=session.epochs,
        loss=(1 / step, float("inf"), 5e-324)[step % 3],
        accuracy=None if step % 2 else 1 / step,
        time_s=1.7e9 + step / 7,
    )


def _through_json(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, facts=json.loads(json.dumps(snapshot.facts)))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda case: case.name if case else "none")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda case: case.name)
def test_a_restored_session_goes_on_as_if_nothing_had_happened(
    optimizer: OptimizerCase, scheduler: SchedulerCase | None
) -> None:
    undisturbed = _session(optimizer, scheduler)
    _run(undisturbed, scheduler, 1, CAPTURED_AFTER)
    captured = undisturbed.capture()
    snapshot = to_snapshot(captured, about={})
    expected = _run(undisturbed, scheduler, CAPTURED_AFTER + 1, STEPS)  # Must not touch the copy.

    state = to_state(_through_json(snapshot))
    assert state.spec.loss is not None
    assert isinstance(weight := state.spec.loss.arguments["weight"], Tensor)
    assert bytes_of(weight) == bytes_of(WEIGHT)
    restored = Session.restored(state, Device("cpu"), Limits())
    assert restored.view() == replace(restored.view(), steps=CAPTURED_AFTER, ready=True)
    came = _run(restored, scheduler, CAPTURED_AFTER + 1, STEPS)
    assert came == expected
    assert restored.view() == undisturbed.view()
    assert restored.sequence == undisturbed.sequence


class _Journal:
    """Keeps what a session writes down."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, change: Change, sequence: int) -> None:
        record = to_record(change, sequence, time_s=float(sequence))
        tensors = [(number, tensor.clone()) for number, tensor in record.tensors]
        facts = json.loads(json.dumps(record.facts))
        self.records.append(replace(record, facts=facts, tensors=tensors))


@pytest.mark.parametrize(
    "scheduler",
    [SCHEDULERS[1], SCHEDULERS[2], SCHEDULERS[-2]],
    ids=["step-lr", "step-lr-epochs", "lambda-lr-epochs"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda case: case.name)
def test_a_replayed_session_is_the_one_that_was_recorded(
    optimizer: OptimizerCase, scheduler: SchedulerCase
) -> None:
    recorded = _session(optimizer, scheduler)
    snapshot = _through_json(to_snapshot(recorded.capture(), about={}))
    recorded.recorder = journal = _Journal()
    _run(recorded, scheduler, 1, CAPTURED_AFTER)
    recorded.set_parameters({1: torch.full((7, 9), 0.5)})
    groups = tuple(
        replace(group, hyperparameters={**group.hyperparameters, "lr": 0.02})
        for group in recorded.spec.groups
    )
    spec = replace(recorded.spec, groups=groups, loss=None, allow_non_finite=True)
    recorded.change(spec, [True, False])
    _run(recorded, scheduler, CAPTURED_AFTER + 1, CAPTURED_AFTER + 5)

    replayed = Session.restored(to_state(snapshot), Device("cpu"), Limits())
    times = [replay(replayed, record) for record in journal.records]
    assert times == [record.sequence for record in journal.records]
    assert replayed.spec == spec
    assert replayed.view() == recorded.view()
    assert replayed.last_outcome == recorded.last_outcome
    ours = _run(replayed, scheduler, CAPTURED_AFTER + 6, STEPS)
    assert ours == _run(recorded, scheduler, CAPTURED_AFTER + 6, STEPS)


def test_a_session_that_begins_is_restored_as_one() -> None:
    spec = spec_of(OPTIMIZERS[0], SCHEDULERS[1], groups=1)
    session = Session(decode_spec.session_spec(spec, Limits()), Device("cpu"), Limits())
    session.set_parameters({2: torch.ones(9)})
    state = to_state(_through_json(to_snapshot(session.capture(), about={"tenant": "x"})))
    restored = Session.restored(state, Device("cpu"), Limits(expression_chars_max=1))
    assert restored.view() == session.view()
    assert not restored.view().ready
    assert [bytes_of(each) for each in restored.parameters] == [
        bytes_of(each) for each in session.parameters
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[::5], ids=lambda case: case.name)
def test_other_data_types_are_restored_too(optimizer: OptimizerCase, dtype: torch.dtype) -> None:
    spec = decode_spec.session_spec(spec_of(optimizer, None, 2, dtype), Limits())
    session = Session(spec, Device("cpu"), Limits())
    session.set_parameters(dict(enumerate(initial_parameters(dtype).values())))

    def gradients(step: int) -> Sequence[Tensor | None]:
        given = gradients_of_steps(dtype)[step]
        return [given[name].clone() if name in given else None for name in SMALL.shapes]

    for step in range(5):
        session.step(gradients(step))
    snapshot = _through_json(to_snapshot(session.capture(), about={}))
    restored = Session.restored(to_state(snapshot), Device("cpu"), Limits())
    for step in range(5, 9):
        assert session.step(gradients(step)) == restored.step(gradients(step))
        ours, theirs = session.parameters, restored.parameters
        assert [bytes_of(each) for each in ours] == [bytes_of(each) for each in theirs]
