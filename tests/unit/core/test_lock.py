"""Many readers or one writer, first come, first served, whoever is cancelled."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_server.core.lock import SharedLock


class _Scene:
    """Tasks that hold a lock until they are told to let go."""

    def __init__(self) -> None:
        self.lock = SharedLock()
        self.inside: list[str] = []
        self.order: list[str] = []
        self._doors: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str) -> None:
        """Ask for the lock: as a writer if the name begins with W."""
        self._doors[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._hold(name))
        await self._settle()

    async def go(self, name: str) -> None:
        self._doors[name].set()
        await self._settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await self._settle()

    async def end(self) -> None:
        for door in self._doors.values():
            door.set()
        await asyncio.wait_for(asyncio.gather(*self._tasks.values(), return_exceptions=True), 5)

    async def _hold(self, name: str) -> None:
        holding = self.lock.exclusive() if name.startswith("W") else self.lock.shared()
        async with holding:
            self.inside.append(name)
            self.order.append(name)
            self._check()
            try:
                await self._doors[name].wait()
            finally:
                self.inside.remove(name)

    def _check(self) -> None:
        writers = [name for name in self.inside if name.startswith("W")]
        assert not writers or len(self.inside) == 1, self.inside

    async def _settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_readers_hold_it_together_and_a_writer_alone() -> None:
    async def scene() -> None:
        here = _Scene()
        await here.come("R1")
        await here.come("R2")
        assert here.inside == ["R1", "R2"]
        await here.come("W1")
        assert here.inside == ["R1", "R2"]
        await here.go("R1")
        assert here.inside == ["R2"]
        await here.go("R2")
        assert here.inside == ["W1"]
        await here.come("R3")
        await here.come("W2")
        assert here.inside == ["W1"]
        await here.end()

    asyncio.run(scene())


def test_a_flow_of_readers_does_not_keep_a_writer_out() -> None:
    async def scene() -> None:
        here = _Scene()
        await here.come("R1")
        await here.come("W1")
        await here.come("R2")
        assert here.inside == ["R1"]
        await here.go("R1")
        assert here.inside == ["W1"]
        await here.go("W1")
        assert here.inside == ["R2"]
        await here.end()

    asyncio.run(scene())


def test_writers_go_in_the_order_in_which_they_came() -> None:
    async def scene() -> None:
        here = _Scene()
        names = [f"W{i}" for i in range(8)]
        for name in names:
            await here.come(name)
        for name in names:
            assert here.inside == [name]
            await here.go(name)
        assert here.order == names

    asyncio.run(scene())


def test_a_writer_that_gives_up_lets_the_readers_behind_it_in() -> None:
    async def scene() -> None:
        here = _Scene()
        await here.come("R1")
        await here.come("W1")
        await here.come("R2")
        await here.cancel("W1")
        assert here.inside == ["R1", "R2"]
        await here.end()

    asyncio.run(scene())


@pytest.mark.parametrize("first", ["R1", "W1"])
def test_a_holder_that_is_cancelled_leaves_no_lock_behind(first: str) -> None:
    async def scene() -> None:
        here = _Scene()
        await here.come(first)
        await here.come("W2")
        await here.cancel(first)
        assert here.inside == ["W2"]
        await here.end()

    asyncio.run(scene())


def test_one_that_is_cancelled_in_the_moment_of_getting_it_leaves_no_lock_behind() -> None:
    async def scene() -> None:
        lock = SharedLock()
        held, waiting = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with lock.exclusive():
                held.set()
                await waiting.wait()

        async def take() -> None:
            async with lock.exclusive():
                pass

        holder, taker = asyncio.create_task(hold()), asyncio.create_task(take())
        await held.wait()
        await asyncio.sleep(0)
        waiting.set()
        await asyncio.sleep(0)  # The holder lets go, and the taker is granted it,
        taker.cancel()  # but has not run yet.
        await asyncio.gather(holder, taker, return_exceptions=True)
        async with asyncio.timeout(1), lock.exclusive():
            pass

    asyncio.run(scene())


ACTS = st.lists(
    st.tuples(st.sampled_from(["come", "go", "cancel"]), st.integers(0, 9)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(acts=ACTS, writers=st.sets(st.integers(0, 9)))
def test_whatever_happens_it_is_never_shared_with_a_writer_and_never_lost(
    acts: list[tuple[str, int]], writers: set[int]
) -> None:
    async def scene() -> None:
        here = _Scene()
        came: set[str] = set()
        for act, number in acts:
            name = f"{'W' if number in writers else 'R'}{number}"
            if act == "come" and name not in came:
                came.add(name)
                await here.come(name)
            elif act != "come" and name in came:
                await (here.go(name) if act == "go" else here.cancel(name))
        await here.end()
        async with asyncio.timeout(1), here.lock.exclusive():
            assert here.inside == []

    asyncio.run(scene())
