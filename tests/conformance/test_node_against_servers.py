"""The Node client and servers that ask who it is, or that are killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority, ServerFiles, token_file
from relay import relay
from server_process import running_server

pytestmark = pytest.mark.timeout(300)

STEPS = 10


def test_node_client_shows_who_it_is(node: Path, tmp_path: Path) -> None:
    authority = Authority()
    files, client = ServerFiles.of(tmp_path, authority.server()), authority.client("worker")
    paths = {name: tmp_path / f"client.{name}" for name in ("ca", "certificate", "key")}
    paths["ca"].write_bytes(authority.root)
    paths["certificate"].write_bytes(client.certificate)
    paths["key"].write_bytes(client.key)
    tokens = token_file(tmp_path / "tokens.toml", [("one", "a" * 32), ("other", "b" * 32)])
    flags = [*files.flags, "--tls-client-ca", str(paths["ca"]), "--tokens", str(tokens)]
    with running_server(*flags) as server:
        tests = subprocess.run(
            ["node", "--test", *sorted(map(str, node.glob("test/secured/*.test.js")))],
            env={
                **os.environ,
                "OPTSERVE_ADDRESS": server.address,
                "OPTSERVE_TOKENS": f"{'a' * 32},{'b' * 32}",
                **{f"OPTSERVE_{name.upper()}": str(path) for name, path in paths.items()},
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass [1-9]", tests.stdout, re.MULTILINE)


def test_node_client_goes_on_with_another_token(node: Path, tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "tokens.toml", [])
    with running_server("--tokens", str(tokens)) as server:
        tests = subprocess.run(
            ["node", "--test", *sorted(map(str, node.glob("test/renewed/*.test.js")))],
            env={
                **os.environ,
                "OPTSERVE_ADDRESS": server.address,
                "OPTSERVE_TOKENS": str(tokens),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass 2", tests.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("durability", "lost"),
    [
        pytest.param({"mode": "JOURNAL"}, 0, id="journal"),
        pytest.param({"mode": "SNAPSHOT", "snapshotSteps": 4}, 1, id="snapshot"),
    ],
)
def test_node_client_goes_on_when_the_server_was_killed(
    node: Path, tmp_path: Path, durability: dict[str, Any], lost: int
) -> None:
    with (
        running_server("--data-dir", str(tmp_path)) as first,
        relay(first.address) as wire,
        subprocess.Popen(
            ["node", "test/restarted/train.js", wire.address, str(STEPS), json.dumps(durability)],
            cwd=node,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as training,
    ):
        assert training.stdout is not None
        assert json.loads(training.stdout.readline()) == "killable"
        first.process.kill()
        first.process.wait()
        with running_server("--data-dir", str(tmp_path)) as second:
            wire.retarget(second.address)
            lines = training.communicate("go on\n", timeout=120)[0].splitlines()
            assert training.returncode == 0
    *losses, parameters = map(json.loads, lines)
    resumed = {"resumesFrom": STEPS // 2 + 1 - lost, "lost": lost, "kept": STEPS // 2 - lost}
    assert losses == ([resumed | {"again": "StepsLostError"}] if lost else [])
    value, momentum = np.float32(0), np.float32(0)
    for step in range(1, STEPS + 1):
        momentum = np.float32(momentum * np.float32(0.5) + np.float32(step))
        value -= momentum
    assert parameters == [value] * 8
