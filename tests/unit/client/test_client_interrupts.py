"""How a process ends that uses the client: by Ctrl-C, or without closing anything."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest
from server_process import ServerProcess

import optserve_client as optserve

PROLOGUE = """
import sys, numpy as np, optserve_client as optserve
def connect():
    return optserve.connect(sys.argv[1], progress=False)
ones, sgd = np.ones(3), optserve.optim.SGD(lr=0.5)
"""


def run(script: str, server: ServerProcess) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-c"),
            *(PROLOGUE + textwrap.dedent(script), server.address),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(script: str, server: ServerProcess) -> Sequence[str]:
    """Interrupt a script a moment after its first line; return its lines of standard error."""
    process = run(script, server)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    return stderr.splitlines()


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_ctrl_c_in_a_waiting_step_ends_the_process_and_deletes_its_session(
    via: str, server: ServerProcess
) -> None:
    with optserve.connect(server.address) as client:
        before = len(list(client.list_sessions()))
        script = f"""
            with connect() as client, client.create_session(
                {{"w": ones}}, optimizer=sgd, workers=2, via={via!r}
            ) as session:
                print("waiting", flush=True)
                session.step({{"w": ones}})
        """
        stderr = interrupted(script, server)
        assert stderr[0].startswith("Traceback")
        assert stderr[-1] == "KeyboardInterrupt"
        assert sum(line.startswith("Traceback") for line in stderr) == 1
        assert len(list(client.list_sessions())) == before


def test_ctrl_c_in_an_asyncio_step_ends_the_process_and_deletes_its_session(
    server: ServerProcess,
) -> None:
    with optserve.connect(server.address) as client:
        before = len(list(client.list_sessions()))
        script = """
            import asyncio
            from optserve_client import aio
            async def main():
                async with aio.connect(sys.argv[1]) as client:
                    async with client.create_session(
                        {"w": ones}, optimizer=sgd, workers=2
                    ) as session:
                        print("waiting", flush=True)
                        await session.step({"w": ones})
            asyncio.run(main())
        """
        stderr = interrupted(script, server)
        assert stderr[-1] == "KeyboardInterrupt"
        assert len(list(client.list_sessions())) == before


def test_a_process_that_closes_nothing_ends_at_once_and_silently(server: ServerProcess) -> None:
    script = """
        client = connect()
        session = client.create_session({"w": ones}, optimizer=sgd)
        session.step({"w": ones})
        print(session.session_id)
    """
    process = run(script, server)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "")
    with optserve.connect(server.address) as client:
        client.delete_session(stdout.strip())


def test_what_is_forgotten_frees_its_threads_and_its_worker(server: ServerProcess) -> None:
    script = """
        import gc, threading, time
        client = connect()
        session = client.create_session({"w": ones}, optimizer=sgd)
        session.step({"w": ones})
        session_id = session.session_id
        del session
        gc.collect()
        again = client.join_session(session_id)
        deadline = time.monotonic() + 10
        while True:
            try:
                assert again.step({"w": ones}).step == 2
                break
            except optserve.WorkerBusyError:
                assert time.monotonic() < deadline
        again.delete()
        del client, again
        gc.collect()
        while threading.active_count() > 1:
            assert time.monotonic() < deadline, threading.enumerate()
            time.sleep(0.01)
    """
    process = run(script, server)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
