"""Servers over a disk in memory: one that is stopped, one that is killed, and what comes after."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from drivers import Tensors, reopened, take
from drivers_grpc import StubDriver
from event_loop import EventLoopThread
from faults.disks import MemoryDisk
from messages import bytes_of
from scenarios.models import B_GROUP, gradients, spec

from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import Adam
from optserve.v1.optimizer_service_pb2 import ListLossPointsRequest
from optserve.v1.scheduler_pb2 import StepLR
from optserve.v1.session_pb2 import Durability, DurabilityMode, LossPoint, Session, SessionSpec
from optserve_server.core.device import Device
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.storage import Origin
from optserve_server.core.surroundings import Overlap, Surroundings
from optserve_server.rpc.access import Access
from optserve_server.rpc.server import Server
from optserve_server.storage.local import LocalStorage

JOURNAL = Durability(mode=DurabilityMode.DURABILITY_MODE_JOURNAL)
FSYNC = Durability(mode=DurabilityMode.DURABILITY_MODE_JOURNAL, fsync=True)
HERE = Origin(torch=str(torch.__version__), device="cpu")


def snapshots(steps: int, seconds: float = 3600.0) -> Durability:
    """Return mode SNAPSHOT: every so many steps, or seconds."""
    return Durability(
        mode=DurabilityMode.DURABILITY_MODE_SNAPSHOT, snapshot_steps=steps, snapshot_s=seconds
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableServer:
    """A server in this process, and its disk."""

    address: str
    driver: StubDriver
    registry: SessionRegistry
    loop: EventLoopThread
    disk: MemoryDisk

    def killed(self) -> MemoryDisk:
        """Return the disk as it would be if the process were killed now."""
        while True:
            try:
                disk = copy.deepcopy(self.disk)
            except RuntimeError:  # A snapshot was just being written.
                time.sleep(0.001)
            else:
                disk.restart()
                return disk

    def unplugged(self) -> MemoryDisk:
        """Return the disk as it would be if the power were lost now."""
        disk = self.killed()
        disk.lose_power()
        return disk


@contextmanager
def durable_server(
    disk: MemoryDisk | None = None,
    limits: Limits | None = None,
    *,
    origin: Origin = HERE,
    replay_foreign: bool = False,
    access: Access | None = None,
    overlap: Overlap = Overlap.AUTO,
) -> Iterator[DurableServer]:
    """Serve the sessions of a disk; at the end stop as SIGTERM does.

    Who asks callers for a token (``access``) refuses those of ``DurableServer.driver``.
    """
    disk = disk or MemoryDisk()
    with EventLoopThread() as loop, ThreadPoolExecutor(4) as executor:
        storage = LocalStorage(disk, origin)
        surroundings = Surroundings(
            device=Device("cpu"),
            executor=executor,
            clock=time.time,
            observer=NullObserver(),
            overlap=overlap,
            persistence=Persistence(
                storage=storage, executor=executor, origin=origin, replay_foreign=replay_foreign
            ),
        )
        registry = loop.call(lambda: SessionRegistry(limits or Limits(), surroundings))
        loop.run(registry.load())
        server = loop.call(lambda: Server(registry, access))
        address = loop.run(server.start("127.0.0.1", 0))
        with StubDriver(address) as driver:
            yield DurableServer(
                address=address, driver=driver, registry=registry, loop=loop, disk=disk
            )
        loop.run(server.stop(0))
        loop.run(registry.settle())
        storage.close()


def durable_spec(durability: Durability, *, workers: int = 0) -> SessionSpec:
    """Return a spec that has one of everything, and survives."""
    wanted = spec(
        Adam(lr=0.1),
        groups=[B_GROUP],
        scheduler=StepLR(step_size=3),
        loss=CrossEntropyLoss(),
        workers=workers,
    )
    wanted.durability.CopyFrom(durability)
    return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that a client can see of a session."""

    session: Session
    parameters: dict[str, bytes]
    points: list[LossPoint]


def see(driver: StubDriver, session_id: str) -> Seen:
    """Look at all of a session, less how long ago its last step was."""
    history = driver.loss_points(ListLossPointsRequest(session_id=session_id))
    session = driver.get(session_id)
    session.status.ClearField("step_time")
    return Seen(
        session=session,
        parameters=_bytes(driver.download(session_id)),
        points=list(history.points),
    )


def stepped(driver: StubDriver, session_id: str, first: int, last: int) -> dict[str, bytes]:
    """Take steps, each with its own gradients; return the parameters after the last one."""
    parameters: Tensors = {}
    with reopened(driver, session_id) as worker:
        for step in range(first, last + 1):
            parameters = take(worker, step, gradients(step)).parameters
    return _bytes(parameters)


def paths(disk: MemoryDisk, directory: str = "") -> list[str]:
    """Return the paths of all files."""
    found = []
    for entry in disk.entries(directory):
        path = f"{directory}/{entry.name}".lstrip("/")
        found += paths(disk, path) if entry.is_directory else [path]
    return found


def _bytes(parameters: Tensors) -> dict[str, bytes]:
    return {name: bytes_of(value) for name, value in parameters.items()}
