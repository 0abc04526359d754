"""The Node client's own tests, its sample, and its README."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from server_process import running_server

pytestmark = pytest.mark.timeout(300)


def run(folder: Path, *arguments: str, address: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *arguments],
        cwd=folder,
        env={**os.environ, "OPTSERVE_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )


def test_units_of_the_node_client(node: Path) -> None:
    files = [str(path) for path in sorted(node.glob("test/*.test.js"))]
    tests = run(node, "--test", *files)
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass [1-9]", tests.stdout, re.MULTILINE)


def test_node_client_when_its_connection_breaks(node: Path, exam_address: str) -> None:
    files = [str(path) for path in sorted(node.glob("test/live/*.test.js"))]
    tests = run(node, "--test", *files, address=exam_address)
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass [1-9]", tests.stdout, re.MULTILINE)


def test_checkpoints_of_the_node_client(node: Path, tmp_path: Path) -> None:
    files = [str(path) for path in sorted(node.glob("test/stored/*.test.js"))]
    with running_server("--data-dir", str(tmp_path)) as server:
        tests = run(node, "--test", *files, address=server.address)
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass [1-9]", tests.stdout, re.MULTILINE)


@pytest.mark.large
def test_node_client_trains_a_hundred_million_parameters(node: Path, exam_address: str) -> None:
    files = [str(path) for path in sorted(node.glob("test/large/*.test.js"))]
    tests = run(node, "--test", *files, address=exam_address)
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^# pass 1", tests.stdout, re.MULTILINE)


def test_node_quickstart_trains(node: Path, exam_address: str) -> None:
    sample = run(node, "samples/quickstart.js", exam_address)
    assert sample.returncode == 0, sample.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", sample.stdout)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("block", "printed"),
    [
        pytest.param(
            0, r"1 0\.404", id="first-steps"
        ),  # The mean of ln(1 + e^-0.8), ln(1 + e^-0.6).
        pytest.param(1, r"1 -0\.5\n2 -1\.5\n3 -3\n4 -5\n$", id="when-the-connection-breaks"),
        pytest.param(2, r"2 -1\.5\n2 -3\n$", id="checkpoints"),
    ],
)
def test_code_of_the_node_readme_runs(block: int, printed: str, node: Path, tmp_path: Path) -> None:
    codes = re.findall(r"```js\n(.*?)```", (node / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(codes) == 3
    with running_server("--data-dir", str(tmp_path)) as server:
        code = codes[block].replace("localhost:50051", server.address)
        example = run(node, "--input-type=module", "--eval", code)
    assert example.returncode == 0, example.stderr
    assert re.match(printed, example.stdout)


def test_types_and_formatting_of_the_node_client(node: Path) -> None:
    check = subprocess.run(
        ["npm", "run", "--silent", "check"], cwd=node, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
