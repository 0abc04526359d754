"""What is generated from the .proto files is current, and their style is buf's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sources import ROOT

PROTOS = ROOT / "protos"
GENERATOR = ROOT / ".venv-generate" / "bin" / "python"
STUBS = sorted(PROTOS.glob("optserve/v1/*_pb2.py"))


def test_stubs_help_texts_and_surface_are_current() -> None:
    if not GENERATOR.exists():
        pytest.fail("the generator is not installed: `make check` and `make test` install it")
    check = subprocess.run(
        [GENERATOR, PROTOS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_buf_has_no_complaint() -> None:
    buf = Path(sys.executable).with_name("buf")
    lint = subprocess.run([buf, "lint"], cwd=PROTOS, capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.name)
def test_stubs_run_with_the_oldest_protobuf_that_is_promised(stub: Path) -> None:
    generated = re.search(r"^# Protobuf Python Version: (\S+)$", stub.read_text(), re.MULTILINE)
    assert generated is not None
    assert _version(generated[1]) <= _floor("protobuf")


def test_stubs_run_with_the_oldest_grpcio_that_is_promised() -> None:
    stub = PROTOS / "optserve" / "v1" / "optimizer_service_pb2_grpc.py"
    generated = re.search(r"^GRPC_GENERATED_VERSION = '(\S+)'$", stub.read_text(), re.MULTILINE)
    assert generated is not None
    assert _version(generated[1]) <= _floor("grpcio")


def _floor(distribution: str) -> tuple[int, ...]:
    project = tomllib.loads((PROTOS / "pyproject.toml").read_text())["project"]
    floors = [re.match(rf"{distribution}>=([\d.]+),", item) for item in project["dependencies"]]
    (floor,) = [found[1] for found in floors if found]
    return _version(floor)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
