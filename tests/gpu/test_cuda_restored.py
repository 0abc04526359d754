"""Sessions that live on a CUDA device are captured, restored and replayed there, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from messages import bytes_of
from parity.cases import OPTIMIZERS, SCHEDULERS, OptimizerCase
from parity.trajectories import gradients_of_steps, initial_parameters, spec_of

from optserve_server.core.changes import Change, replay, to_record
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.session import Session
from optserve_server.core.state import to_snapshot, to_state
from optserve_server.core.storage import Record
from optserve_server.rpc import decode_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

FIRST_OF_KIND = list({case.kind: case for case in reversed(OPTIMIZERS)}.values())


def _step(session: Session, step: int) -> list[bytes]:
    given, names = gradients_of_steps()[step - 1], list(initial_parameters())
    session.step([session.load(given[name]) if name in given else None for name in names])
    return [bytes_of(value) for value in session.parameters]


@pytest.mark.parametrize("optimizer", FIRST_OF_KIND, ids=lambda case: case.name)
def test_a_session_on_the_device_goes_on_as_if_nothing_had_happened(
    optimizer: OptimizerCase,
) -> None:
    device, limits = Device("cuda"), Limits()
    spec = decode_spec.session_spec(spec_of(optimizer, SCHEDULERS[1], groups=2), limits)
    session = Session(spec, device, limits)
    session.set_parameters(dict(enumerate(initial_parameters().values())))
    records: list[Record] = []

    def record(change: Change, sequence: int) -> None:
        kept = to_record(change, sequence, 0.0)
        tensors = [(position, tensor.clone()) for position, tensor in kept.tensors]
        records.append(dataclasses.replace(kept, tensors=tensors))

    for step in range(1, 14):
        _step(session, step)
    snapshot = to_snapshot(session.capture(), about={})
    session.recorder = record
    expected = [_step(session, step) for step in range(14, 31)]
    for replayed_to in (13, 20):
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        state = to_state(dataclasses.replace(snapshot, tensors=tensors))
        restored = Session.restored(state, device, limits)
        for kept in records[: replayed_to - 13]:
            replay(restored, kept)
        came = [_step(restored, step) for step in range(replayed_to + 1, 31)]
        assert came == expected[replayed_to - 13 :]
