"""Flags win over the environment, which wins over the file, which wins over the defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from optserve_server.config import Config, MisspeltVariableError, SettingsFileError, load

DEFAULT = Config.model_fields["sessions_max"].default
FLAG, ENVIRONMENT, FILE = 1, 2, 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "optserve.toml"
    path.write_text(f"sessions_max = {FILE}\nport = 50052\n")
    return path


@pytest.mark.parametrize(
    ("flag", "environment", "with_file", "wins"),
    [
        pytest.param(True, True, True, FLAG, id="flag"),
        pytest.param(False, True, True, ENVIRONMENT, id="environment"),
        pytest.param(False, False, True, FILE, id="file"),
        pytest.param(False, False, False, DEFAULT, id="default"),
    ],
)
def test_the_nearest_setting_wins(
    flag: bool,
    environment: bool,
    with_file: bool,
    wins: int,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--config", str(file)] if with_file else []
    arguments += ["--sessions-max", str(FLAG)] if flag else []
    if environment:
        monkeypatch.setenv("OPTSERVE_SESSIONS_MAX", str(ENVIRONMENT))
    settings = load(arguments, {})
    assert settings.sessions_max == wins
    assert settings.port == (50052 if with_file else 50051)


def test_the_environment_may_name_the_file(file: Path) -> None:
    assert load([], {"OPTSERVE_CONFIG": str(file)}).sessions_max == FILE


def test_sizes_may_have_units() -> None:
    assert load(["--memory-bytes-max", "8GiB"], {}).memory_bytes_max == 8 << 30


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("sesions_max = 3", id="misspelt-name"),
        pytest.param("sessions_max = 0", id="too-small"),
        pytest.param('port = "many"', id="no-number"),
        pytest.param("torch_threads = 1000000", id="too-many-threads"),
        pytest.param("idle_timeout_s = nan", id="nan"),
    ],
)
def test_a_wrong_setting_is_refused(content: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(ValidationError):
        load(["--config", str(file)], {})


@pytest.mark.parametrize("content", ["sessions_max =", None], ids=["no-toml", "no-file"])
def test_an_unreadable_file_is_refused(content: str | None, file: Path) -> None:
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(SettingsFileError, match=str(file)):
        load(["--config", str(file)], {})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("OPTSERVE_SESIONS_MAX", "OPTSERVE_SESSIONS_MAX"),
        ("OPTSERVE_SESSION_MAX", "OPTSERVE_SESSIONS_MAX"),
        ("OPTSERVE_DRAIN_TIMEOUT", "OPTSERVE_DRAIN_TIMEOUT_S"),
        ("OPTSERVE_MEMORY_BYTE_MAX", "OPTSERVE_MEMORY_BYTES_MAX"),
    ],
)
def test_a_misspelt_variable_is_refused_with_what_was_meant(variable: str, meant: str) -> None:
    with pytest.raises(MisspeltVariableError, match=f"{variable} is no setting; {meant} is one"):
        load([], {variable: "3"})


def test_a_variable_of_somebody_else_is_left_alone() -> None:
    kubernetes = [
        *("OPTSERVE_SERVICE_HOST", "OPTSERVE_SERVICE_PORT", "OPTSERVE_SERVICE_PORT_GRPC"),
        *("OPTSERVE_PORT_50051_TCP", "OPTSERVE_PORT_50051_TCP_ADDR", "OPTSERVE_PORT_9464_TCP_PORT"),
    ]
    load([], dict.fromkeys([*kubernetes, "SESIONS_MAX", "OPTSERVE_FAILPOINTS"], "x"))


TLS = ["--tls-certificate", "server.pem", "--tls-key", "server.key"]
JWT = {"--jwt-jwks": "keys.json", "--jwt-issuer": "https://a.example", "--jwt-audience": "b"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "unix:/run/optserve.sock"]
)
def test_what_only_this_host_can_reach_needs_no_tls(host: str) -> None:
    assert load(["--host", host], {}).is_private


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example"])
def test_what_others_can_reach_needs_tls_or_a_flag(host: str) -> None:
    with pytest.raises(ValidationError, match="there is no TLS"):
        load(["--host", host], {})
    assert not load(["--host", host, "--allow-plaintext", "true"], {}).is_private
    assert load(["--host", host, *TLS], {}).tls_certificate == Path("server.pem")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(TLS[:2], id="certificate-without-key"),
        pytest.param(TLS[2:], id="key-without-certificate"),
        pytest.param(["--tls-client-ca", "clients.pem"], id="clients-without-tls"),
        pytest.param(["--metrics-tls", "true"], id="metrics-without-certificate"),
        pytest.param([*TLS, "--metrics-client-ca", "ca.pem"], id="scrapers-without-tls"),
        pytest.param(["--jwt-jwks", "keys.json"], id="keys-without-issuer"),
        pytest.param(["--jwt-issuer", "https://a.example"], id="issuer-without-keys"),
        pytest.param(["--jwt-audience", "b"], id="audience-without-keys"),
    ],
)
def test_settings_that_need_others_do_not_stand_alone(flags: list[str]) -> None:
    with pytest.raises(ValidationError, match="need"):
        load(flags, {})


TENANTS = {
    "tokens": ["--tokens", "tokens.toml"],
    "issued": [word for pair in JWT.items() for word in pair],
    "certificates": [*TLS, "--tls-client-ca", "clients.pem"],
}


@pytest.mark.parametrize("flags", TENANTS.values(), ids=TENANTS)
def test_tenants_do_not_see_each_other_in_metrics_that_others_can_reach(flags: list[str]) -> None:
    load(flags, {})
    flags = [*flags, "--metrics-host", "0.0.0.0"]
    with pytest.raises(ValidationError, match="names the sessions of all tenants"):
        load(flags, {})
    encrypted = [*TLS, "--metrics-tls", "true"]
    with pytest.raises(ValidationError, match="names the sessions of all tenants"):
        load([*flags, *encrypted], {})
    load([*flags, *encrypted, "--metrics-client-ca", "scrapers.pem"], {})
    load([*flags, "--metrics-sessions-max", "0"], {})
    load([*flags, "--allow-plaintext", "true"], {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_tenants_metrics_may_be_for_all(host: str) -> None:
    assert load(["--metrics-host", host], {}).metrics_host == host


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("https://a.example/keys", True),
        ("http://127.0.0.1:80/keys", True),
        ("http://localhost/keys", True),
        ("/etc/optserve/keys.json", True),
        ("http://a.example/keys", False),
        ("ftp://a.example/keys", False),
        ("file:///etc/keys.json", False),
    ],
)
def test_keys_come_from_where_nobody_can_change_them(place: str, allowed: bool) -> None:
    flags = [word for flag in {**JWT, "--jwt-jwks": place}.items() for word in flag]
    if allowed:
        assert load(flags, {}).jwt_jwks == place
    else:
        with pytest.raises(ValidationError, match="https URL, or a file"):
            load(flags, {})


def test_server_says_what_is_wrong_and_ends() -> None:
    command = [sys.executable, "-m", "optserve_server", "--sessions-max", "none"]
    server = subprocess.run(command, capture_output=True, text=True, check=False)
    assert server.returncode == 2
    assert "sessions_max" in server.stderr
    assert "Traceback" not in server.stderr
