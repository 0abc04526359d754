"""What one tenant has is no other's, and is given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from drivers_core import registry_on
from event_loop import EventLoopThread
from scenarios.models import spec

from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.actor import SessionActor
from optserve_server.core.beginning import Beginning
from optserve_server.core.errors import CallerError, MemoryExhaustedError, TooManyError
from optserve_server.core.limits import Limits
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.spec import SessionSpec
from optserve_server.rpc.decode_spec import session_spec

LARGE = 100_000


class Tenants:
    """Tenants of a registry, who create and delete."""

    def __init__(self, loop: EventLoopThread, registry: SessionRegistry) -> None:
        self._loop = loop
        self.registry = registry

    def create(self, tenant: str, wanted: SessionSpec) -> SessionActor:
        return self._loop.run(self.registry.create(tenant, Beginning(spec=wanted)))

    def delete(self, actor: SessionActor) -> None:
        self._loop.run(self.registry.delete(actor.opened.tenant, actor.session_id))

    def grow(self, actor: SessionActor, count: int) -> None:
        def grown() -> None:
            with self.registry.resized(actor, actor.reserved_bytes + count):
                pass

        self._loop.call(grown)


@contextmanager
def _tenants(limits: Limits) -> Iterator[Tenants]:
    with EventLoopThread() as loop, registry_on(loop, limits) as registry:
        yield Tenants(loop, registry)


def _spec(optimizer: SGD | None = None) -> SessionSpec:
    wanted = spec(optimizer or SGD(), parameters={"w": torch.zeros(LARGE)})
    return session_spec(wanted, Limits())


def test_a_tenant_has_its_own_number_of_sessions() -> None:
    with _tenants(Limits(tenant_sessions_max=2)) as tenants:
        first, _ = tenants.create("a", _spec()), tenants.create("a", _spec())
        with pytest.raises(TooManyError, match="tenant 'a' has 2 sessions of 2") as caught:
            tenants.create("a", _spec())
        assert caught.value.retry_after_s is not None
        tenants.create("b", _spec())
        tenants.delete(first)
        tenants.create("a", _spec())


def test_a_tenant_has_its_own_share_of_the_memory() -> None:
    with _tenants(Limits()) as asked:
        size = asked.create("a", _spec()).reserved_bytes
    with _tenants(Limits(tenant_bytes_max=2 * size)) as tenants:
        first, second = tenants.create("a", _spec()), tenants.create("a", _spec())
        before = tenants.registry.budget.reserved_bytes
        with pytest.raises(MemoryExhaustedError, match=f"tenant 'a' has {2 * size} of {2 * size}"):
            tenants.create("a", _spec())
        with pytest.raises(MemoryExhaustedError, match="tenant 'a'"):
            tenants.grow(first, 1)
        assert tenants.registry.budget.reserved_bytes == before
        tenants.create("b", _spec())
        tenants.delete(second)
        tenants.grow(first, size)
        tenants.delete(first)  # With what it has grown by.
        for _ in range(2):
            tenants.create("a", _spec())


def test_what_the_server_has_not_is_not_counted_as_the_tenant_s() -> None:
    with _tenants(Limits()) as asked:
        size = asked.create("a", _spec()).reserved_bytes
    limits = Limits(tenant_sessions_max=1, tenant_bytes_max=size, memory_bytes_max=size)
    with _tenants(limits) as tenants:
        hers = tenants.create("b", _spec())
        for _ in range(3):  # The server's memory, and not the tenant's.
            with pytest.raises(MemoryExhaustedError, match="0 of"):
                tenants.create("a", _spec())
        tenants.delete(hers)
        tenants.create("a", _spec())


def test_a_session_that_torch_does_not_take_is_no_tenant_s() -> None:
    with _tenants(Limits(tenant_sessions_max=1)) as tenants:
        with pytest.raises(CallerError):
            tenants.create("a", _spec(SGD(momentum=0.0, dampening=0.5, nesterov=True)))
        tenants.create("a", _spec())
