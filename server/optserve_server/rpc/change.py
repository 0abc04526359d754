"""UpdateSession: what to change in a running session, checked against what torch can change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve_server.core.actor import SessionActor
from optserve_server.core.admission import session_bytes
from optserve_server.core.errors import InvalidFieldError, UnknownNameError
from optserve_server.core.limits import Limits
from optserve_server.core.optimizers import OPTIMIZERS, rehearse
from optserve_server.core.resolve import check_fixed
from optserve_server.core.session import Session
from optserve_server.core.spec import Choice, GroupSpec, SessionSpec, Value
from optserve_server.core.tenant import TenantRegistry
from optserve_server.core.work import to_its_end
from optserve_server.rpc import decode, decode_spec, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be in force after a change."""

    spec: SessionSpec
    rates_set: Sequence[bool]
    """For each group: whether the change sets its learning rate."""
    reserved_bytes: int
    """How much memory the session will need."""


async def update(request: UpdateSessionRequest, registry: TenantRegistry) -> SessionActor:
    """Change a running session between two steps; return it.

    Raises:
        OptserveError: Something in the request is not allowed, torch keeps no state for it, or
            there is no memory for it. Nothing was changed.
    """
    limits, device = registry.limits, registry.surroundings.device.torch
    actor = await registry.find(request.session_id)
    async with actor.writing() as session:
        plan = await actor.work.run(lambda: _plan(request, session, device, limits))
        encode.check_fits(plan.spec, limits, "loss")

        async def make() -> None:
            with registry.resized(actor, plan.reserved_bytes):
                await actor.make(lambda: session.change(plan.spec, plan.rates_set))

        # Also if the call is cancelled: what has changed has its memory.
        await to_its_end(actor.work.spawn(make()))
    return actor


def _plan(
    request: UpdateSessionRequest, session: Session, device: torch.device, limits: Limits
) -> _Plan:
    """Decode a change, and rehearse it."""
    old = session.spec
    kind = OPTIMIZERS[old.optimizer.kind]
    common = decode_spec.overrides(request.optimizer, kind.name, "optimizer", limits)
    own = [_own(request, common, group, old, limits) for group in old.groups]
    groups = tuple(
        dataclasses.replace(group, hyperparameters={**group.hyperparameters, **values})
        for group, values in zip(old.groups, own, strict=True)
    )
    for before, after in zip(old.groups, groups, strict=True):
        _rehearse(session, device, before, after)
    loss = old.loss
    if request.HasField("loss"):
        loss = decode_spec.choice(request.loss, "loss", limits)
    policy = decode.non_finite(request.non_finite, "non_finite")
    spec = dataclasses.replace(
        old,
        optimizer=Choice(kind=kind.name, arguments={**old.optimizer.arguments, **common}),
        groups=groups,
        loss=loss,
        allow_non_finite=old.allow_non_finite if policy is None else policy,
        display_name=(
            decode.display_name(request.display_name, limits, "display_name")
            if request.HasField("display_name")
            else old.display_name
        ),
    )
    return _Plan(
        spec=spec,
        rates_set=["lr" in values for values in own],
        reserved_bytes=session_bytes(spec, device),
    )


def _own(
    request: UpdateSessionRequest,
    common: Mapping[str, Value],
    group: GroupSpec,
    spec: SessionSpec,
    limits: Limits,
) -> Mapping[str, Value]:
    """Return the hyperparameters that the request changes in a group."""
    kind = OPTIMIZERS[spec.optimizer.kind]
    own = dict(common)
    names = {each.name for each in spec.groups}
    for i, message in enumerate(request.groups):
        if message.name not in names:
            raise UnknownNameError(
                f"the session has no group {message.name!r}",
                field=f"groups[{i}].name",
                expected=", ".join(sorted(names)),
                actual=message.name,
            )
        if message.parameters:
            raise InvalidFieldError(
                "a parameter stays in its group", field=f"groups[{i}].parameters", expected="none"
            )
        if message.name == group.name:
            own |= decode_spec.overrides(
                message.overrides, kind.name, f"groups[{i}].overrides", limits
            )
    check_fixed(kind, own, group.hyperparameters, "optimizer")
    return own


def _rehearse(session: Session, device: torch.device, old: GroupSpec, new: GroupSpec) -> None:
    if new.hyperparameters == old.hyperparameters:
        return
    kind = OPTIMIZERS[session.spec.optimizer.kind]
    for dtype in {session.spec.parameters[i].dtype for i in old.parameters}:
        if session.steps:
            rehearse(kind, dtype, device, old.hyperparameters, new.hyperparameters)
        else:
            rehearse(kind, dtype, device, new.hyperparameters)
