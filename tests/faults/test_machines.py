"""A small share of every breaking machine; the whole is `make soak`."""

from __future__ import annotations

import pytest
from faults.machines.frame import Effort, Machine, summary_line
from faults.machines.modelling import CALLED_BY
from faults.machines.overload import ASKED_TIMES, MEMORY_BYTES_MAX, overload
from faults.machines.suite import MACHINES

from optserve_server.rpc.server import SERVICE

SEED = 20261122


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_machine_breaks_things_and_every_promise_holds(machine: Machine) -> None:
    report = machine.run(Effort(count=machine.test_count, seed=SEED, thorough=False))
    assert report.ok, "\n".join([summary_line(machine, report), *report.failures])
    assert report.tried >= machine.test_count


def test_a_server_that_takes_more_memory_than_it_may_is_noticed() -> None:
    given_bytes = 2 * ASKED_TIMES * MEMORY_BYTES_MAX  # It lets everybody in.
    report = overload(Effort(count=24, seed=SEED), given_bytes)
    assert any("the server took" in failure for failure in report.failures), report.notes


def test_the_model_has_a_rule_for_every_rpc() -> None:
    assert set(CALLED_BY) == {method.name for method in SERVICE.methods}
