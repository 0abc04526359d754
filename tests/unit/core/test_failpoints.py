"""Failpoints: what arms them, and when they act."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from optserve_server.core import failpoints


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def _reach(name: str, times: int) -> list[int | None]:
    errors: list[int | None] = []
    for _ in range(times):
        try:
            failpoints.reach(name)
        except OSError as error:
            errors.append(error.errno)
        else:
            errors.append(None)
    return errors


def test_unarmed_nothing_fails() -> None:
    failpoints.arm("")
    assert _reach("here", 3) == [None] * 3


def test_an_error_comes_at_its_time_or_every_time() -> None:
    failpoints.arm("here=full@2,there=broken")
    assert _reach("here", 3) == [None, errno.ENOSPC, None]
    assert _reach("there", 2) == [errno.EIO] * 2
    assert _reach("elsewhere", 1) == [None]
    assert set(failpoints.armed()) == {"here", "there"}


def test_kill_ends_the_process_at_its_time() -> None:
    script = (
        "from optserve_server.core import failpoints as f; f.arm('x=kill@2');"
        "f.reach('x'); print('once', flush=True); f.reach('x'); print('twice')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"once\n")


@pytest.mark.parametrize(
    "text", ["x", "x=", "x=explode", "=kill", "x=kill@", "x=kill@0", "x=full@a"]
)
def test_what_is_no_failpoint_is_refused_and_arms_nothing(text: str) -> None:
    failpoints.arm("kept=full")
    with pytest.raises(failpoints.FailpointError, match="no failpoint"):
        failpoints.arm(text)
    assert failpoints.armed() == ("kept",)
