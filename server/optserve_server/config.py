"""Every knob of the server, in one frozen model.

Precedence: flags, then environment (``OPTSERVE_PORT``), then the file that ``--config`` or
``OPTSERVE_CONFIG`` names (TOML, the same names), then the defaults here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import tomllib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from optserve.limits import MESSAGE_HEADROOM_BYTES
from optserve_server.core.limits import WINDOW_BYTES, Limits

ENVIRONMENT_PREFIX = "OPTSERVE_"
_NEAR = 0.8  # Of 1 for the same: some letters more, or less, or others.
_LIMITS = Limits()  # The defaults, with the reasons for them.

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(BaseSettings):
    """Serve optimizer sessions over gRPC, with metrics for Prometheus beside them.

    Every flag can also be set in the environment (--sessions-max as OPTSERVE_SESSIONS_MAX) and in a
    TOML file (sessions_max = 10); a flag wins over the environment, which wins over the file.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENVIRONMENT_PREFIX,
        cli_prog_name="optserve-server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    config: Path | None = None
    """TOML file with settings; the names are those of the flags, with underscores."""

    host: str = "127.0.0.1"
    """Address to serve gRPC on, or unix:/path of a socket, for the server's user alone. One that
    others can reach needs TLS, or allow_plaintext."""
    port: Port = 50051
    """Port to serve gRPC on; 0 takes a free one."""
    tls_certificate: Path | None = None
    """PEM file with the server's certificate, and those between it and its root. Turns on TLS.
    Read again when it changes, like all files of these settings."""
    tls_key: Path | None = None
    """PEM file with the certificate's key, not encrypted."""
    tls_client_ca: Path | None = None
    """PEM file with the roots of clients' certificates, which clients must have then. Without
    tokens the certificate's name is the tenant."""
    allow_plaintext: bool = False
    """Whether to serve without TLS where others than this host can listen, and change what
    passes; or /metrics, with every tenant's sessions, where others than this host can ask."""
    tokens: Path | None = None
    """TOML file with the hashes of tokens, and whose they are; callers must have one then.
    `python -m optserve_server.rpc.tokens TENANT` makes one."""
    jwt_jwks: str | None = None
    """Where the public keys of an identity provider are, whose tokens (JWT) callers may have: an
    https URL, or a file."""
    jwt_issuer: str | None = None
    """What these tokens have as `iss`."""
    jwt_audience: str | None = None
    """What these tokens have as `aud`: what the provider calls this server."""
    jwt_claim: Annotated[str, Field(min_length=1)] = "sub"
    """The claim of these tokens that names the tenant."""
    jwt_leeway_s: Annotated[float, Field(ge=0, le=600)] = 30.0
    """How far the provider's clock may be from this one's."""
    metrics_host: str = "127.0.0.1"
    """Address to serve /metrics on."""
    metrics_port: Port = 9464
    """Port to serve /metrics on; 0 takes a free one."""
    metrics_tls: bool = False
    """Whether /metrics is HTTPS, with tls_certificate."""
    metrics_client_ca: Path | None = None
    """PEM file with the roots of the certificates that whoever asks for /metrics must have then."""
    metrics_sessions_max: Annotated[int, Field(ge=0)] = 100
    """How many sessions have series of their own in /metrics."""
    ready_file: Path | None = None
    """File to write once the server serves: JSON with `address` and `metrics_address`."""

    device: str = "auto"
    """Where sessions live: cpu, cuda, cuda:INDEX, or auto for a CUDA device if there is one."""
    threads: Annotated[int, Field(ge=1, le=256)] = 4
    """How many sessions may compute at the same time."""
    torch_threads: Annotated[int, Field(ge=0, le=256)] = 0
    """How many cores torch uses for one operation; 0 leaves it to torch."""
    shared_memory: bool = True
    """Whether clients of the same user on this host may have tensors in memory that they share."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether to answer a step while its gradients still arrive, which a slow link needs and which
    takes up to 48 MiB for each step under way: on, off, or auto for clients that are not on this
    host."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages that are logged."""
    log_format: Literal["text", "json"] = "text"
    """One line for each event: for people, or for machines."""

    data_dir: Path | None = None
    """Directory in which durable sessions survive the server; on a disk of this host, and for one
    server only. Without it sessions are in memory only."""
    replay_foreign_journals: bool = False
    """Whether to go on with sessions whose journals another version of torch, or another device,
    has written, though it may make other bits of them."""
    archive_url: str | None = None
    """Where to keep a copy of what is finished in the data directory, as fsspec names it:
    s3://bucket/prefix, or file:///mnt/backup. Each data directory has its own. It needs
    optserve-server[remote]."""
    archive_interval_s: Seconds = 60.0
    """How many seconds after one look at what the archive lacks there is the next one."""
    archive_restore: bool = False
    """Whether to fill an empty data directory from the archive first."""
    idle_timeout_s: Seconds = _LIMITS.idle_timeout_s
    """A session that nobody has used for so many seconds is deleted, if it is not durable."""
    durable_idle_timeout_s: Seconds = 2_592_000.0
    """A durable session that nobody has used for so many seconds is deleted: by default 30 days.
    They are counted from the start of the server, for what it finds on disk."""
    drain_timeout_s: Seconds = 30.0
    """How many seconds calls have to end by themselves after SIGTERM."""

    sessions_max: Count = _LIMITS.sessions_max
    """How many sessions there may be."""
    streams_max: Count = _LIMITS.streams_max
    """How many streams may be open."""
    calls_max: Count = _LIMITS.calls_max
    """How many calls with one message each way may go on; at least as many as one session has
    workers. Their messages may take calls_max times message_bytes_max beside memory_bytes_max."""
    request_rate_max: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _LIMITS.request_rate_max
    """How many calls a tenant may begin in a second; 0 means as many as it likes."""
    tenant_sessions_max: Annotated[int, Field(ge=0, le=1 << 31)] = _LIMITS.tenant_sessions_max
    """How many sessions a tenant may have; 0 means as many as all together."""
    tenant_bytes_max: ByteSize = ByteSize(_LIMITS.tenant_bytes_max)
    """Memory that a tenant may take, for its sessions and whatever goes on in them; 0 means as much
    as all together."""
    tenant_disk_bytes_max: ByteSize = ByteSize(_LIMITS.tenant_disk_bytes_max)
    """How much a tenant may have on disk: snapshots, journals and checkpoints; 0 means as much as
    there is room."""
    memory_bytes_max: ByteSize = ByteSize(0)
    """Memory that sessions may take together, such as 8GiB; 0 means 80 % of the device's memory."""
    session_bytes_max: ByteSize = ByteSize(0)
    """Memory that one session may take; 0 means as much as all together."""
    journal_bytes_max: Annotated[ByteSize, Field(ge=1 << 20)] = ByteSize(_LIMITS.journal_bytes_max)
    """How large a session's journal may become before a snapshot makes up for it."""
    park_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _LIMITS.park_timeout_s
    """A durable session that nobody has used for so many seconds leaves the memory, and comes back
    from disk when it is called; 0 means never."""
    loss_bytes_max: ByteSize = ByteSize(_LIMITS.loss_bytes_max)
    """How large predictions and targets of one evaluation may be."""
    message_bytes_max: Annotated[ByteSize, Field(ge=1 << 20, le=1 << 30)] = ByteSize(
        _LIMITS.message_bytes_max
    )
    """How large one message may be. More than 4MiB is more than clients take by default."""
    chunk_bytes_max: Annotated[ByteSize, Field(ge=1 << 10)] = ByteSize(_LIMITS.chunk_bytes_max)
    """How much tensor data one message of a stream may hold; well below message_bytes_max."""
    window_bytes: Annotated[ByteSize, Field(ge=1 << 16, le=1 << 30)] = ByteSize(WINDOW_BYTES)
    """How much of a call may come before anybody reads it, beside the message that is being read.
    A long, fast link wants more; each connection may take twice as much memory."""
    parameters_max: Count = _LIMITS.parameters_max
    """How many parameters a session may have."""
    groups_max: Count = _LIMITS.groups_max
    """How many groups a session may have."""
    workers_max: Count = _LIMITS.workers_max
    """How many workers a session may have."""
    dimensions_max: Annotated[int, Field(ge=1, le=64)] = _LIMITS.dimensions_max
    """How many dimensions a tensor may have."""
    elements_max: Count = _LIMITS.elements_max
    """How many elements a list among hyperparameters, such as milestones, may have."""
    name_bytes_max: Count = _LIMITS.name_bytes_max
    """How long a name may be."""
    digest_bytes_max: Annotated[int, Field(ge=16, le=1024)] = _LIMITS.digest_bytes_max
    """How long the digest of a step may be; one is kept for each worker."""
    request_id_bytes_max: Annotated[int, Field(ge=16, le=1024)] = _LIMITS.request_id_bytes_max
    """How long the id of a request to create a session may be; it is kept with the session."""
    expression_chars_max: Annotated[int, Field(ge=1, le=4096)] = _LIMITS.expression_chars_max
    """How long an expression of LambdaLR may be."""
    expression_nodes_max: Annotated[int, Field(ge=1, le=512)] = _LIMITS.expression_nodes_max
    """How many numbers, names and operations an expression may hold."""
    loss_points_max: Count = _LIMITS.loss_points_max
    """How many points of each split a session's history keeps."""
    checkpoints_max: Count = _LIMITS.checkpoints_max
    """How many checkpoints a tenant may have."""
    round_timeout_s: Seconds = _LIMITS.round_timeout_s
    """How many seconds a step waits for the other workers."""
    stall_timeout_s: Seconds = _LIMITS.stall_timeout_s
    """How many seconds a client may neither send nor read in the middle of a transfer."""
    transfer_rate_min: Annotated[float, Field(gt=0, allow_inf_nan=False)] = (
        _LIMITS.transfer_rate_min
    )
    """How many bytes in a second a transfer must move on the whole, beside stall_timeout_s."""

    @model_validator(mode="after")
    def _chunks_fit_into_messages(self) -> Config:
        if self.chunk_bytes_max + MESSAGE_HEADROOM_BYTES > self.message_bytes_max:
            raise ValueError(
                f"chunk_bytes_max ({self.chunk_bytes_max}) must be at least"
                f" {MESSAGE_HEADROOM_BYTES} below message_bytes_max ({self.message_bytes_max})"
            )
        return self

    @model_validator(mode="after")
    def _files_belong_together(self) -> Config:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key need each other")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.metrics_tls and not self.tls_certificate:
            raise ValueError("metrics_tls needs tls_certificate and tls_key")
        if self.metrics_client_ca and not self.metrics_tls:
            raise ValueError("metrics_client_ca needs metrics_tls")
        provider = (self.jwt_jwks, self.jwt_issuer, self.jwt_audience)
        if any(provider) and not all(provider):
            raise ValueError("jwt_jwks, jwt_issuer and jwt_audience need each other")
        if self.jwt_jwks and not find_spec("jwt"):
            raise ValueError('jwt_jwks needs PyJWT: pip install "optserve-server[jwt]"')
        return self

    @model_validator(mode="after")
    def _archives_have_something_to_copy(self) -> Config:
        if self.archive_url and not self.data_dir:
            raise ValueError("archive_url needs data_dir")
        if self.archive_restore and not self.archive_url:
            raise ValueError("archive_restore needs archive_url")
        if self.archive_url and not find_spec("fsspec"):
            raise ValueError('archive_url needs fsspec: pip install "optserve-server[remote]"')
        return self

    @model_validator(mode="after")
    def _secrets_do_not_travel_in_clear(self) -> Config:
        if not (self.is_private or self.tls_certificate or self.allow_plaintext):
            raise ValueError(
                f"others than this host can reach {self.host}, and there is no TLS: give"
                " tls_certificate and tls_key, or allow_plaintext = true where the network, or a"
                " proxy in front, is to be trusted"
            )
        url = urlsplit(self.jwt_jwks or "")
        if url.scheme and "://" in str(self.jwt_jwks):
            private = url.scheme == "http" and _is_loopback(url.hostname or "")
            if url.scheme != "https" and not private:
                raise ValueError("jwt_jwks must be an https URL, or a file")
        return self

    @model_validator(mode="after")
    def _tenants_do_not_see_each_other_in_metrics(self) -> Config:
        has_tenants = self.tokens or self.jwt_jwks or self.tls_client_ca
        is_closed = _is_loopback(self.metrics_host) or self.metrics_client_ca
        if has_tenants and self.metrics_sessions_max and not (is_closed or self.allow_plaintext):
            raise ValueError(
                f"/metrics names the sessions of all tenants, and others than this host can reach"
                f" {self.metrics_host}: give metrics_tls and metrics_client_ca, name no sessions"
                " (metrics_sessions_max = 0), or allow_plaintext = true where the network is to be"
                " trusted"
            )
        return self

    @property
    def is_private(self) -> bool:
        """Whether nobody but this host can reach the server."""
        return self.host.startswith("unix:") or _is_loopback(self.host)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes it.
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes it.
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; pydantic puts the flags before them."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def limits(self, device_memory_bytes: int) -> Limits:
        """Return the limits; those that follow the device's memory are filled in."""
        names = {field.name for field in dataclasses.fields(Limits)}
        values = {name: value for name, value in self.model_dump().items() if name in names}
        memory = int(self.memory_bytes_max) or device_memory_bytes
        values |= {
            "memory_bytes_max": memory,
            "session_bytes_max": int(self.session_bytes_max) or memory,
        }
        return Limits(**values)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class SettingsError(Exception):
    """The settings cannot be read; the message says why."""


class SettingsFileError(SettingsError):
    """The settings file cannot be read."""


class MisspeltVariableError(SettingsError):
    """A variable of the environment has nearly the name of a setting."""


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Read the settings from flags, the process's environment, and the file that one of them names.

    Args:
        arguments: The command line, without the program's name.
        environment: os.environ, where pydantic reads the other settings itself.

    Raises:
        pydantic.ValidationError: A setting is not allowed.
        SettingsFileError: The file cannot be read, or is no TOML.
        MisspeltVariableError: A setting in the environment would have no effect.
        SystemExit: The command line asks for help, or is wrong; it has been said on the terminal.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=environment.get(ENVIRONMENT_PREFIX + "CONFIG"))
    path = finder.parse_known_args(arguments)[0].config
    _check_file(path)
    _check_names(environment)

    class _Config(Config):
        __doc__ = Config.__doc__
        model_config = SettingsConfigDict(toml_file=path, cli_parse_args=list(arguments))

    return _Config()


def _check_names(environment: Mapping[str, str]) -> None:
    """Pydantic passes over variables that it does not know.

    Those that are near to none of ours may be anybody's: Kubernetes sets some for each service.
    """
    for variable in environment:
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or name in Config.model_fields:
            continue
        nearest = difflib.get_close_matches(name, Config.model_fields, 1, _NEAR)
        if nearest:
            meant = ENVIRONMENT_PREFIX + nearest[0].upper()
            raise MisspeltVariableError(f"{variable} is no setting; {meant} is one")


def _check_file(path: str | None) -> None:
    """Pydantic passes over a file that is not there.

    A settings file that has no effect is a trap.
    """
    try:
        if path is not None:
            tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsFileError(f"cannot read the settings file {path}: {error}") from error
