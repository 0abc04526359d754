"""The machine that a simulated server runs on: its threads, its disk, and its power.

The server's process can end between any two events, and at any operation of the disk; what it had
begun does not come to its end then, and who had called it hears nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from faults.disks import CrashError, MemoryDisk
from faults.machines.simulation.clockwork import LateThreads
from faults.machines.simulation.scene import Scene

from optserve_server.core.device import Device
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.storage import Origin, StorageError, StorageFailedError
from optserve_server.core.surroundings import Surroundings
from optserve_server.rpc.servicer import OptimizerServicer
from optserve_server.storage.local import LocalStorage
from optserve_server.storage.store import LocalSessionStore

_ORIGIN = Origin(torch="simulated", device="cpu")
_TURN_S = 0.002  # Of a thread that computes, on the mean.
_SYNC_S = 0.02  # Of a group commit, on the mean: longer than it takes to step.
_DOWN_S = 0.5  # Until a server that has gone is back, at most.
_PARK_TIMEOUT_S = 0.05  # Between two streams a session may be parked.
_PARK_INTERVAL_S = 0.7

# Which process a task, a timer or a callback belongs to; 0: none of the server's.
_PROCESS: contextvars.ContextVar[int] = contextvars.ContextVar("process", default=0)


class Host:
    """Runs one server process after the other."""

    registry: SessionRegistry

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._random = scene.random("host")
        self._disk = MemoryDisk(scene.random("disk"))
        self._number = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads: list[LateThreads] = []
        self._stopped = asyncio.Event()
        self.up = asyncio.Event()
        """Set while a server serves."""
        self._power_lost = False
        self._operations = 0
        scene.loop.set_task_factory(self._task)  # type: ignore[arg-type] # As documented.

    async def run(self) -> None:
        """Start the server, and start it again whenever it has ended."""
        scene, setting = self._scene, self._scene.setting
        for at_s in setting.crashes_s:
            scene.loop.call_later(at_s, self.stop)
        if setting.full_s is not None:
            scene.loop.call_later(setting.full_s, self._fill)
        while True:
            self._stopped.clear()
            self._number += 1
            scene.note(f"host: process {self._number} starts")
            context = contextvars.copy_context()
            context.run(_PROCESS.set, self._number)
            try:
                await scene.loop.create_task(self._start(context), context=context)
                await self._stopped.wait()
            except (CrashError, StorageError) as error:
                scene.note(f"host: it does not start: {error!r}")
                self.stop()
            await self._clear_up()
            await asyncio.sleep(self._random.uniform(0, _DOWN_S))

    def stop(self) -> None:
        """End the process at once; with it, sometimes, the power goes."""
        if self._stopped.is_set():
            return
        scene = self._scene
        self._power_lost = scene.setting.power and self._random.random() < 0.5
        scene.note(f"host: process {self._number} is gone, power lost: {self._power_lost}")
        self._stopped.set()
        self.up.clear()
        self._disk.before = _gone
        for threads in self._threads:
            threads.stop()
        scene.methods = None
        for line in scene.lines:
            line.kill()

    def late_commits(self) -> AbstractContextManager[object]:
        """Have what is appended synced later, as by a thread that gathers; while a block runs."""
        random, right = self._scene.random("commits"), LocalSessionStore.commit

        def commit(store: LocalSessionStore) -> Future[None]:
            done: Future[None] = Future()
            done.set_running_or_notify_cancel()

            def sync() -> None:
                try:
                    right(store).result()
                except CrashError:
                    self.stop()
                except StorageFailedError as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)

            self._scene.loop.call_later(random.expovariate(1 / _SYNC_S), sync)
            return done

        return patch.object(LocalSessionStore, "commit", commit)

    async def _start(self, context: contextvars.Context) -> None:
        """Start the server, as app.py does."""
        scene = self._scene
        self._disk.before = self._before
        self._threads = [
            LateThreads(scene.loop, scene.random(f"{use} {self._number}"), self.stop, turn_s=turn_s)
            for use, turn_s in (("threads", _TURN_S), ("disk", scene.setting.disk_turn_s))
        ]
        surroundings = Surroundings(
            device=Device("cpu"),
            executor=self._threads[0],
            clock=scene.loop.time,
            monotonic=scene.loop.time,
            observer=NullObserver(),
            shared_memory=False,
            persistence=Persistence(
                storage=LocalStorage(
                    self._disk,
                    _ORIGIN,
                    segment_bytes_max=scene.setting.segment_bytes_max,
                    threaded=False,
                ),
                executor=self._threads[1],
                origin=_ORIGIN,
            ),
        )
        self.registry = SessionRegistry(
            Limits(journal_bytes_max=scene.setting.journal_bytes_max), surroundings
        )
        await self.registry.load()
        servicer = OptimizerServicer(self.registry)
        scene.methods = lambda name: getattr(servicer, name)
        scene.context = context
        self.up.set()
        scene.loop.create_task(self._park(self.registry))

    async def _park(self, registry: SessionRegistry) -> None:
        """Park what nobody uses, as app.py does."""
        while True:
            await asyncio.sleep(self._random.expovariate(1 / _PARK_INTERVAL_S))
            for session_id in await registry.park_idle(_PARK_TIMEOUT_S):
                self._scene.note(f"host: session {session_id} is parked")

    async def _clear_up(self) -> None:
        """Let nothing of the process be left; what it had on disk is there, as far as it was."""
        for task in self._tasks:
            task.cancel()
        while self._tasks:  # What these begin when they are cancelled comes to nothing by itself.
            await asyncio.wait(self._tasks)
        self._scene.loop.forget(lambda context: context.get(_PROCESS) == self._number)
        if self._power_lost:
            self._disk.lose_power()
        else:
            self._disk.restart()

    def _task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        """Make a task, and keep in mind whose it is."""
        task = asyncio.Task(coroutine, loop=loop, context=context)
        if context.get(_PROCESS) if context else _PROCESS.get():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return task

    def _before(self, operation: str) -> None:
        """Do harm at an operation of the disk, if it is the one."""
        self._operations += 1
        if self._operations in self._scene.setting.crash_operations:
            self._scene.note(f"host: crashes at: {operation}")
            raise CrashError
        if self._operations in self._scene.setting.broken_operations:
            self._scene.note(f"host: the disk fails at: {operation}")
            self._scene.disk_fails = True
            self._scene.tolerated.add("SESSION_FAILED")
            self._scene.loop.call_later(self._random.uniform(0, 2), self.stop)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _fill(self) -> None:
        """Leave little room on the disk for a while."""
        scene = self._scene
        scene.note("host: the disk is full")
        scene.tolerated.add("STORAGE_FULL")
        room, self._disk.capacity = self._disk.capacity, self._disk.used_bytes
        self._disk.capacity += self._random.randrange(2_000)

        def empty() -> None:
            scene.note("host: there is room again")
            self._disk.capacity = room

        scene.loop.call_later(self._random.uniform(0, 5), empty)


def _gone(_operation: str) -> None:
    raise CrashError
