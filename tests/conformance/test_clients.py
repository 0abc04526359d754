"""Every client takes the same exam, and the exam notices a wrong bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAM = Path(__file__).parents[2] / "client" / "conformance"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["python", "node"])
def client(request: pytest.FixtureRequest) -> str:
    """Name a client that can run here."""
    name: str = request.param
    if name == "node":
        request.getfixturevalue("node")
    return name


def examine(client: str, address: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAM / "run.py"), "--client", client, "--require", client]
    return subprocess.run(
        [*command, "--address", address, *flags], capture_output=True, text=True, check=False
    )


def test_a_client_passes_the_exam(client: str, exam_address: str) -> None:
    exam = examine(client, exam_address)
    assert exam.returncode == 0, exam.stdout + exam.stderr
    passed = [line.split()[0] for line in exam.stdout.splitlines() if line.endswith("pass")]
    assert sorted(passed) == sorted(path.stem for path in (EXAM / "scenarios").glob("*.json"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd_create is of Linux")
def test_the_python_client_passes_the_exam_in_shared_memory(exam_address: str) -> None:
    # In a session with encodings the tensors of every worker travel; and what lies in shared memory
    # has no digest of its content.
    paths = (EXAM / "scenarios").glob("*.json")
    elsewhere = ("wire-", "conflicting-steps")
    scenarios = sorted(str(path) for path in paths if not path.name.startswith(elsewhere))
    command = [sys.executable, "-m", "optserve_client.conform", *scenarios]
    run = subprocess.run(
        [*command, "--target", exam_address, "--lane", "shm"],
        capture_output=True,
        text=True,
        check=False,
    )
    failures = [line for line in run.stdout.splitlines() if json.loads(line)["failure"]]
    assert not failures, run.stderr
    assert len(run.stdout.splitlines()) == len(scenarios)


@pytest.mark.parametrize("wrong", ["bit", "number", "refusal", "length", "act", "key"])
def test_a_client_notices_what_is_wrong(
    client: str, exam_address: str, tmp_path: Path, wrong: str
) -> None:
    scenario = json.loads((EXAM / "scenarios" / "sgd.json").read_text())
    step = scenario["acts"][2]
    parameter = step["expect"]["parameters"][0]
    if wrong == "bit":
        first = parameter["data"][0]
        parameter["data"] = ("B" if first == "A" else "A") + parameter["data"][1:]
    elif wrong == "number":
        step["expect"]["rates"]["default"] += 2**-50
    elif wrong == "refusal":
        step["refused"] = {"reason": "SHAPE_MISMATCH"}
    elif wrong == "length":
        step["expect"]["parameters"].append(parameter)
    elif wrong == "act":
        step["act"] = "leap"
    elif wrong == "key":
        step["stride"] = 2
    (tmp_path / "sgd.json").write_text(json.dumps(scenario))
    exam = examine(client, exam_address, "--folder", str(tmp_path))
    assert exam.returncode == 1, exam.stdout
    assert f"{client} failed sgd: act 3:" in exam.stdout


def test_a_connection_that_should_have_been_cut_is_missed(
    client: str, exam_address: str, tmp_path: Path
) -> None:
    scenario = json.loads((EXAM / "scenarios" / "sgd.json").read_text())
    scenario["cuts"] = [{"sent": 1 << 30}]
    (tmp_path / "sgd.json").write_text(json.dumps(scenario))
    exam = examine(client, exam_address, "--folder", str(tmp_path))
    assert exam.returncode == 1, exam.stdout
    assert f"{client} failed sgd: the connection was cut 0 times, and not 1" in exam.stdout


def test_the_scenarios_are_what_torch_computes() -> None:
    check = subprocess.run(
        [sys.executable, str(EXAM / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
