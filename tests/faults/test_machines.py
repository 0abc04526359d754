"""A small share of every breaking machine; the whole is `make soak`."""

from __future__ import annotations

import pytest
from faults.machines.frame import Effort, Machine, summary_line
from faults.machines.suite import MACHINES

SEED = 20261122


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_machine_breaks_things_and_every_promise_holds(machine: Machine) -> None:
    report = machine.run(Effort(count=machine.test_count, seed=SEED, thorough=False))
    assert report.ok, "\n".join([summary_line(machine, report), *report.failures])
    assert report.tried >= machine.test_count
