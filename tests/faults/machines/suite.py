"""All machines, in the order in which they run."""

from __future__ import annotations

from faults.machines.calling import call
from faults.machines.cutting import cut
from faults.machines.decoding import decode
from faults.machines.frame import Machine
from faults.machines.killing import kill
from faults.machines.modelling import compare
from faults.machines.overload import overload
from faults.machines.simulating import run_seeds

MACHINES = (
    Machine(
        name="decoders",
        summary="bytes that are nearly right, for all that decodes what strangers send",
        unit="inputs",
        whole_count=800_000,
        whole_s=100,
        test_count=10_000,
        run=decode,
    ),
    Machine(
        name="calls",
        summary="messages that are nearly right, for every rpc, beside a session that trains",
        unit="messages",
        whole_count=200_000,
        whole_s=250,
        test_count=2_000,
        run=call,
    ),
    Machine(
        name="model",
        summary="every rpc in any order, by two tenants, beside a model that does the same",
        unit="examples",
        whole_count=600,
        whole_s=300,
        test_count=20,
        run=compare,
    ),
    Machine(
        name="simulation",
        summary="clients, connections, threads, disks and crashes of chance, in one thread",
        unit="seeds",
        whole_count=10_000,
        whole_s=350,
        test_count=30,
        run=run_seeds,
    ),
    Machine(
        name="cuts",
        summary="connections that are cut, stalled or half-closed at any byte, under real clients",
        unit="connections",
        whole_count=1_000,
        whole_s=120,
        test_count=12,
        run=cut,
    ),
    Machine(
        name="kills",
        summary="a server killed with -9 at random moments and at named ones, under 8 sessions",
        unit="kills",
        whole_count=200,
        whole_s=1_300,
        test_count=1,
        run=kill,
    ),
    Machine(
        name="overload",
        summary="clients that ask together for ten times what a server has",
        unit="clients",
        whole_count=200,
        whole_s=30,
        test_count=24,
        run=overload,
    ),
)
