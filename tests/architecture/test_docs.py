"""What the documents say is true: code runs, commands, flags, paths and links are right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ByteSize
from server_process import ServerProcess, running_server
from sources import ROOT, written

from optserve.v1.optimizer_service_pb2 import Limits
from optserve_server import config
from optserve_server.config import Config
from optserve_server.rpc import probe

DOCUMENTS = written(".md")
EXAMPLES_ADDRESS = "localhost:50051"  # What the examples connect to.


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Yield every block of code in the language, with the document that it is in."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield path, block


EXAMPLES = [pytest.param(code, id=_name(path)) for path, code in _blocks("python")]

COMMANDS = [
    pytest.param(words, id=f"{_name(path)}: {' '.join(words)}")
    for path, block in _blocks("(?:bash|console|sh)")
    for line in block.splitlines()
    if (words := shlex.split(line.removeprefix("$ "), comments=True))
]


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server that has a place for what survives."""
    with running_server("--data-dir", str(tmp_path_factory.mktemp("data"))) as process:
        yield process


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs_and_prints_what_it_says(code: str, keeper: ServerProcess) -> None:
    example = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace(EXAMPLES_ADDRESS, keeper.address)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert example.returncode == 0, example.stderr
    told = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    if told:
        assert example.stdout.splitlines() == told


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_right(words: list[str]) -> None:
    """Run each as far as it has no effect: make without its recipes, the server up to its flags."""
    program, *arguments = words
    if program == "make":
        make = ["make", "--dry-run", *arguments]
        dry_run = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry_run.returncode == 0, dry_run.stderr
    elif arguments[:2] == ["-m", "optserve_server"]:
        config.load(arguments[2:], {})
    elif arguments[:1] == ["-m"]:
        subprocess.run([sys.executable, *arguments, "--help"], check=True, stdout=subprocess.PIPE)
    else:
        assert program in ("docker", "openssl", "pip")
    files = [word for word in arguments if word.startswith("./") or word.endswith((".py", ".yml"))]
    assert not [file for file in files if not (ROOT / file).exists()]


def test_certificates_can_be_made_as_it_is_said(tmp_path: Path) -> None:
    (block,) = [block for _, block in _blocks("bash") if "openssl" in block]
    subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, check=True, capture_output=True)
    root, certificate, key = (tmp_path / name for name in ("root.pem", "server.pem", "server.key"))
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key), "--tls-client-ca"]
    with running_server(*flags, str(root)) as server:
        own = ["--tls-certificate", str(tmp_path / "alice.pem")]
        own += ["--tls-key", str(tmp_path / "alice.key")]
        assert probe.main([server.address, "--tls-ca", str(root), *own]) == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_paths_are_there(document: Path) -> None:
    """What stands in backticks and looks like a path of the repository is one."""
    text = document.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:client|protos|server|tests)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `--.*$", text, re.MULTILINE) == list(_settings_rows())


def test_every_limit_of_the_contract_is_a_setting() -> None:
    assert {field.name for field in Limits.DESCRIPTOR.fields} <= set(Config.model_fields)


def _settings_rows() -> Iterator[str]:
    """Yield the rows of the table of settings in server/README.md, as they must be."""
    for name, field in Config.model_fields.items():
        default = "" if field.default is None else f"`{_shown(field.default)}`"
        meaning = " ".join((field.description or "").split())
        yield f"| `--{name.replace('_', '-')}` | {default} | {meaning} |"


_UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"))


def _shown(value: object) -> str:
    if isinstance(value, ByteSize) and value:
        shift, unit = next(each for each in _UNITS if value >= 1 << each[0])
        return f"{value >> shift}{unit}"
    return str(value)
