"""The one place where the parts are joined: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from optserve.allocator import KEPT_BYTES, Kept, keep_freed_memory
from optserve.reasons import reason_name
from optserve.v1.error_pb2 import Reason
from optserve_server import __version__
from optserve_server.config import Config
from optserve_server.core.device import Device
from optserve_server.core.optimizers import OPTIMIZERS
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.storage import Origin
from optserve_server.core.surroundings import Overlap, Surroundings
from optserve_server.last_resort import LastResort
from optserve_server.rpc.access import Access
from optserve_server.rpc.interceptor import methods_of
from optserve_server.rpc.server import SERVICE, Server
from optserve_server.rpc.tls import Credentials, https_context, server_credentials
from optserve_server.rpc.tokens import Tokens
from optserve_server.storage.archive import Mirror, ObjectStore, Shipping, restore_if_empty
from optserve_server.storage.disk import LocalDisk
from optserve_server.storage.local import LocalStorage
from optserve_server.telemetry.endpoint import MetricsEndpoint
from optserve_server.telemetry.metrics import Build, Metrics

_LOGGER = logging.getLogger(__name__)
_EXPIRY_INTERVALS = 10  # How often within the idle time sessions are looked through.
_DISK_THREADS = 4  # They wait, or replay journals; one disk does not get faster by more.
_MEMORY_INTERVAL_S = 1.0  # How often the allocator is asked what it keeps: 0.1 to 0.4 ms.
_LAME_DUCK_S = 0.25  # Calls that are on their way get an answer, not a broken connection.

END_GRACE_S = 3.0
"""From the end of the drain, or of a second signal, to that of the process."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""They ask the server to stop."""


async def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends what still goes on at once.

    Raises:
        UnusableFileError: A file that the settings name cannot be used.
        DeviceUnavailableError: The device is not there.
        AddressInUseError, OSError: An address cannot be bound.
    """
    # torch's advice to whoever chose the reduction, who is a client and not in front of our log.
    warnings.filterwarnings("ignore", message="reduction: 'mean' divides", category=UserWarning)
    _take_descriptors()
    credentials, access = _credentials(config), _access(config)
    device = Device(config.device)
    keep_freed_memory()
    metrics_registry, metrics = _metrics(config, device)
    with ExitStack() as stack:
        cores = config.torch_threads or torch.get_num_threads()
        # What is small enough to be computed here, on the event loop, ends before a second core
        # would have been woken, which torch's fused kernels do for any size.
        _use_cores(1)
        executor = stack.enter_context(_executor(config.threads, "optserve", cores))
        surroundings = Surroundings(
            device=device,
            executor=executor,
            clock=time.time,
            observer=metrics,
            shared_memory=config.shared_memory,
            overlap=Overlap(config.overlap),
            persistence=stack.enter_context(_persistence(config, device, cores, metrics)),
        )
        registry = SessionRegistry(config.limits(device.memory_bytes()), surroundings)
        if parked := await registry.load():
            _LOGGER.info("sessions found on disk", extra={"sessions": parked})
        endpoint = _endpoint(config, metrics_registry)
        server = Server(registry, access, window_bytes=config.window_bytes)
        try:
            address = await server.start(config.host, config.port, credentials)
            stop = _signalled()  # Before anybody is told that we serve, and so may ask us to stop.
            _announce(config, address, endpoint.address, device)
            await _until_stopped(stop, server, registry, config)
        finally:
            await server.stop(0)
            endpoint.stop()


def _take_descriptors() -> None:
    """Take as many file descriptors as the system lets us: a connection needs one, and a journal.

    By default many systems give each process 1,024 of them, for the sake of select(), which nothing
    here calls, and hundreds of times as many to those that ask.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # Where that is more than the system has.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _credentials(config: Config) -> Credentials | None:
    """Return what to serve TLS with; None if nobody is to."""
    if config.tls_certificate and config.tls_key:
        return server_credentials(config.tls_certificate, config.tls_key, config.tls_client_ca)
    if not config.is_private:
        _LOGGER.warning(
            "no TLS: whoever is between can read, and change, what passes",
            extra={"host": config.host, "tokens_too": bool(config.tokens or config.jwt_jwks)},
        )
    return None


def _access(config: Config) -> Access:
    """Return what asks callers who they are."""
    issuer = None
    if config.jwt_jwks and config.jwt_issuer and config.jwt_audience:
        # Here, and not above: PyJWT need not be installed.
        from optserve_server.rpc.issued import IssuedTokens, keys_at  # noqa: PLC0415

        issuer = IssuedTokens(
            keys=keys_at(config.jwt_jwks),
            issuer=config.jwt_issuer,
            audience=config.jwt_audience,
            claim=config.jwt_claim,
            leeway_s=config.jwt_leeway_s,
        )
    return Access(
        tokens=Tokens(config.tokens) if config.tokens else None,
        issuer=issuer,
        certificates=config.tls_client_ca is not None,
    )


def _executor(count: int, name: str, cores: int) -> ThreadPoolExecutor:
    """Return threads that compute with torch on so many cores: a matter of each thread."""
    return ThreadPoolExecutor(
        count, thread_name_prefix=name, initializer=_use_cores, initargs=(cores,)
    )


def _use_cores(count: int) -> None:
    """Have torch calculate on so many cores in this thread."""
    torch.get_num_threads()  # At its first call in a thread torch takes what anybody has set last.
    torch.set_num_threads(count)


@contextmanager
def _persistence(
    config: Config, device: Device, cores: int, metrics: Metrics
) -> Iterator[Persistence | None]:
    """Open the data directory for a block; None if there is to be none.

    Raises:
        StorageError: Another server has it, or a newer one has written it.
    """
    if config.data_dir is None:
        yield None
        return
    # Kernels for wider vectors may round otherwise: two CPUs are alike if they have the same.
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    origin = Origin(torch=str(torch.__version__), device=device.name if device.is_cuda else cpu)
    with ExitStack() as stack:
        archive = _archive(config)
        if archive and config.archive_restore:
            received = restore_if_empty(archive, LocalDisk(config.data_dir))
            _LOGGER.info("restored from the archive", extra={"bytes": received})
        disk = LocalDisk(config.data_dir)
        storage = LocalStorage(disk, origin)
        stack.callback(storage.close)
        if archive:
            mirror = Mirror(disk, archive)
            shipping = Shipping(mirror, metrics, interval_s=config.archive_interval_s)
            stack.callback(shipping.close)  # After the last snapshot, and before the disk goes.
        yield Persistence(
            storage=storage,
            executor=stack.enter_context(_executor(_DISK_THREADS, "optserve-disk", cores)),
            origin=origin,
            replay_foreign=config.replay_foreign_journals,
        )


def _archive(config: Config) -> ObjectStore | None:
    """Return where the data directory is copied to; None if nowhere."""
    if config.archive_url is None:
        return None
    # Here, and not above: fsspec need not be installed.
    from optserve_server.storage.remote import RemoteStore  # noqa: PLC0415

    return RemoteStore(config.archive_url)


def _metrics(config: Config, device: Device) -> tuple[CollectorRegistry, Metrics]:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    metrics = Metrics(
        registry,
        build=Build(version=__version__, torch=str(torch.__version__), device=str(device.torch)),
        methods=methods_of(SERVICE),
        reasons=[reason_name(reason) for reason in Reason.values()],
        optimizers=OPTIMIZERS,
        sessions_max=config.metrics_sessions_max,
        device_memory_bytes=device.allocated_bytes if device.is_cuda else None,
    )
    return registry, metrics


def _endpoint(config: Config, registry: CollectorRegistry) -> MetricsEndpoint:
    """Serve /metrics from now on."""
    tls = None
    if config.metrics_tls and config.tls_certificate and config.tls_key:
        tls = https_context(config.tls_certificate, config.tls_key, config.metrics_client_ca)
    return MetricsEndpoint(registry, host=config.metrics_host, port=config.metrics_port, tls=tls)


def _announce(config: Config, address: str, metrics_address: str, device: Device) -> None:
    """Say, to people and to whoever started us, that we serve, and where."""
    _LOGGER.info(
        "serving",
        extra={
            "address": address,
            "metrics": f"http{'s' * config.metrics_tls}://{metrics_address}/metrics",
            "device": str(device.torch),
            "version": __version__,
        },
    )
    if config.ready_file:
        ready = {"address": address, "metrics_address": metrics_address}
        _write_whole(config.ready_file, json.dumps(ready) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _signalled() -> asyncio.Event:
    """Return what will be set by the next signal to stop; what was returned before is not."""
    event = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


async def _until_stopped(
    stop: asyncio.Event, server: Server, registry: SessionRegistry, config: Config
) -> None:
    """Expire idle sessions until a signal comes, then drain, and see that the process ends."""
    last_resort = LastResort()
    expiry = asyncio.create_task(_look_after(registry, config))
    giving_back = asyncio.create_task(_give_back_memory())
    await stop.wait()
    expiry.cancel()
    giving_back.cancel()
    _LOGGER.info("draining", extra={"timeout_s": config.drain_timeout_s})
    hurry = _signalled()
    last_resort.end_within(config.drain_timeout_s + END_GRACE_S)
    await server.announce_end()
    registry.drain()
    await asyncio.sleep(_LAME_DUCK_S)
    stopping = asyncio.create_task(server.stop(config.drain_timeout_s))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        last_resort.end_within(END_GRACE_S)
        await server.stop(0)
    await stopping
    hurrying.cancel()
    await registry.settle()
    _LOGGER.info("stopped")


async def _look_after(registry: SessionRegistry, config: Config) -> None:
    """Park, and delete, what nobody has used for long."""
    timeouts_s = [config.idle_timeout_s, config.durable_idle_timeout_s, config.park_timeout_s]
    pause_s = min(timeout_s for timeout_s in timeouts_s if timeout_s) / _EXPIRY_INTERVALS
    while True:
        await asyncio.sleep(pause_s)
        try:
            for session_id in await registry.expire_idle(
                config.idle_timeout_s, config.durable_idle_timeout_s
            ):
                _LOGGER.info("idle session deleted", extra={"session": session_id})
            if config.park_timeout_s:
                for session_id in await registry.park_idle(config.park_timeout_s):
                    _LOGGER.info("idle session parked", extra={"session": session_id})
        except Exception:  # One session's trouble, whatever it is; others are looked after again.
            _LOGGER.exception("an idle session cannot be parked or deleted")


async def _give_back_memory() -> None:
    """Give memory back to the kernel, when the allocator keeps more of it than it is to."""
    kept = Kept()
    while True:
        await asyncio.sleep(_MEMORY_INTERVAL_S)
        if kept.count_bytes() > KEPT_BYTES:
            await asyncio.to_thread(kept.give_back)
