"""UpdateSession: what to change in a running session, checked against what torch can change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve_server.core.admission import session_bytes
from optserve_server.core.errors import InvalidFieldError, UnknownNameError
from optserve_server.core.limits import Limits
from optserve_server.core.optimizers import OPTIMIZERS, rehearse
from optserve_server.core.session import Session, SessionChange
from optserve_server.core.spec import GroupSpec, SessionSpec, Value
from optserve_server.rpc import decode, decode_spec


def plan(
    request: UpdateSessionRequest, session: Session, limits: Limits
) -> tuple[SessionChange, int]:
    """Decode a change and rehearse it; return it, and how many bytes the session will need.

    Raises:
        OptserveError: Something in it is not allowed, or torch keeps no state for it. Nothing was
            changed.
    """
    change = _session_change(request, session, limits)
    groups = tuple(
        dataclasses.replace(group, hyperparameters=values)
        for group, values in zip(session.spec.groups, change.hyperparameters, strict=True)
    )
    return change, session_bytes(dataclasses.replace(session.spec, groups=groups))


def _session_change(
    request: UpdateSessionRequest, session: Session, limits: Limits
) -> SessionChange:
    own = [_own(request, group, session.spec, limits) for group in session.spec.groups]
    changed = [
        {**group.hyperparameters, **values}
        for group, values in zip(session.spec.groups, own, strict=True)
    ]
    for group, values in zip(session.spec.groups, changed, strict=True):
        _rehearse(session, group, values)
    return SessionChange(
        hyperparameters=changed,
        rates_set=["lr" in values for values in own],
        loss=decode_spec.choice(request.loss, "loss", limits) if request.HasField("loss") else None,
        allow_non_finite=decode.non_finite(request.non_finite),
        display_name=(
            decode.display_name(request.display_name, limits)
            if request.HasField("display_name")
            else None
        ),
    )


def _own(
    request: UpdateSessionRequest, group: GroupSpec, spec: SessionSpec, limits: Limits
) -> Mapping[str, Value]:
    """Return the hyperparameters that the request changes in a group."""
    kind = OPTIMIZERS[spec.optimizer.kind]
    own = dict(decode_spec.overrides(request.optimizer, kind.name, "optimizer", limits))
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
    decode_spec.check_change(kind, own, group, "optimizer")
    return own


def _rehearse(session: Session, group: GroupSpec, values: Mapping[str, Value]) -> None:
    if values == group.hyperparameters:
        return
    kind = OPTIMIZERS[session.spec.optimizer.kind]
    dtype = session.spec.parameters[group.parameters[0]].dtype
    if session.steps:
        rehearse(kind, dtype, group.hyperparameters, values)
    else:
        rehearse(kind, dtype, values)
