"""One version for everything that is released together."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from sources import DISTRIBUTIONS, ROOT

import optserve


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_distributions_have_one_version(package: str) -> None:
    project = tomllib.loads((DISTRIBUTIONS[package] / "pyproject.toml").read_text())["project"]
    own = [item for item in project["dependencies"] if item.startswith("optserve")]
    assert project["version"] == optserve.__version__
    assert set(own) <= {f"optserve-protos=={optserve.__version__}"}


def test_node_client_has_the_same_version() -> None:
    package = json.loads((ROOT / "client" / "node" / "package.json").read_text())
    assert package["version"] == optserve.__version__


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(optserve.__version__)}\]", text, re.MULTILINE)


@pytest.mark.parametrize("file", ["requirements-server.txt", "requirements-dev.txt"])
def test_requirements_are_exact(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "-e ./", "-r "))]
    assert wanted
    assert not [line for line in wanted if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
