"""Tokens: what makes them, and the file that knows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optserve_server.rpc.tokens import Tokens, made, main
from optserve_server.rpc.watched import UnusableFileError

COMMAND = [sys.executable, "-m", "optserve_server.rpc.tokens"]
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # Of "test".


def _tenant(tokens: Tokens, token: str) -> str:
    caller = tokens.caller(token)
    assert caller
    assert not caller.ended()
    return caller.tenant


def test_the_command_appends_to_the_file_and_shows_the_token_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    shown = []
    with path.open("a") as file:
        for tenant in ("alice", "bob", "alice"):
            run = subprocess.run(
                [*COMMAND, tenant], stdout=file, stderr=subprocess.PIPE, check=True, text=True
            )
            shown.append(run.stderr.split()[-1])
    tokens = Tokens(path)
    assert [_tenant(tokens, token) for token in shown] == ["alice", "bob", "alice"]
    assert len(set(shown)) == 3
    assert not [token for token in shown if token in path.read_text()]


def test_what_is_no_token_of_the_file_is_nobody_s(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[[token]]\ntenant = "alice"\nsha256 = "{SHA256}"\n')
    tokens = Tokens(path)
    assert _tenant(tokens, "test") == "alice"
    assert tokens.caller("tes") is None
    assert tokens.caller(SHA256) is None
    assert tokens.caller("\udcff") is None  # What is no text can come in a header.


@pytest.mark.parametrize("tenant", ["alice", 'quo"ted', "back\\slash", "Ünï", "a@b.example/c"])
def test_every_name_of_a_tenant_comes_back(tenant: str, tmp_path: Path) -> None:
    token, entry = made(tenant)
    path = tmp_path / "tokens.toml"
    path.write_text(entry)
    assert _tenant(Tokens(path), token) == tenant


@pytest.mark.parametrize("tenant", ["", "a\nb", "x" * 257], ids=["empty", "two-lines", "long"])
def test_what_can_be_no_tenant_s_name_is_refused(tenant: str) -> None:
    assert "1 to 256 printable" in str(main([tenant]))


@pytest.mark.parametrize("arguments", [[], ["alice", "bob"]], ids=len)
def test_it_takes_exactly_one_tenant(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[[token]", id="no-toml"),
        pytest.param("token = 3", id="no-tables"),
        pytest.param('token = ["alice"]', id="no-table"),
        pytest.param(f'[[tokens]]\ntenant = "alice"\nsha256 = "{SHA256}"', id="misspelt"),
        pytest.param('[[token]]\ntenant = "alice"', id="no-hash"),
        pytest.param('[[token]]\ntenant = "alice"\nsha256 = "test"', id="in-clear"),
        pytest.param('[[token]]\ntenant = "alice"\nsha256 = "00"', id="short-hash"),
        pytest.param(f'[[token]]\ntenant = ""\nsha256 = "{SHA256}"', id="no-name"),
        pytest.param(f'[[token]]\ntenant = 1\nsha256 = "{SHA256}"', id="number"),
        pytest.param(f'[[token]]\ntenant = "alice"\nsha256 = "{SHA256}"\nexpires = 1', id="more"),
        pytest.param(f'[[token]]\ntenant = "alice"\nsha256 = "{SHA256}"\n' * 2, id="twice"),
        pytest.param("\x00", id="no-text"),
    ],
)
def test_a_file_that_would_let_in_others_than_it_seems_to_is_refused(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    with pytest.raises(UnusableFileError, match=r"tokens\.toml does not hold"):
        Tokens(path)
