"""The catalogue: what can be chosen, read off the contract and torch."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2
from optserve.v1.optimizer_service_pb2 import CatalogueEntry, GetCatalogueResponse, Hyperparameter
from optserve_server.core import optimizers
from optserve_server.core.losses import LOSSES
from optserve_server.core.optimizers import OPTIMIZERS
from optserve_server.core.schedulers import SCHEDULERS
from optserve_server.core.spec import Value
from optserve_server.rpc.constraints import constraint_of, kind_of

_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
}
_FORMS_OF_LAMBDA = ("lr_lambda", "group_lr_lambdas")


def catalogue() -> GetCatalogueResponse:
    """Return everything that can be chosen, with hyperparameters, defaults and lines of help."""
    texts: dict[str, str] = json.loads(
        importlib.resources.files("optserve.v1").joinpath("help.json").read_text(encoding="utf-8")
    )
    return GetCatalogueResponse(
        optimizers=[
            _entry(field, _optimizer_defaults(kind_of(field).name), texts)
            for field in _kinds(optimizer_pb2.Optimizer.DESCRIPTOR)
        ],
        schedulers=[
            _entry(field, _scheduler_defaults(kind_of(field).name), texts)
            for field in _kinds(scheduler_pb2.Scheduler.DESCRIPTOR)
        ],
        losses=[
            _entry(field, LOSSES[kind_of(field).name].defaults, texts)
            for field in _kinds(loss_pb2.Loss.DESCRIPTOR)
        ],
    )


def _kinds(message: Descriptor) -> list[FieldDescriptor]:
    return list(message.oneofs_by_name["kind"].fields)


def _optimizer_defaults(kind: str) -> dict[str, Value | None]:
    """Return what is in force if nothing is given; None where torch decides at each step."""
    torch_kind = OPTIMIZERS[kind]
    return {**torch_kind.defaults, **optimizers.effective_hyperparameters(torch_kind, {})}


def _scheduler_defaults(kind: str) -> dict[str, Value | None]:
    """Return torch's defaults, without what is required.

    None for the two forms of one argument: neither is required by itself.
    """
    defaults = SCHEDULERS[kind].defaults
    given = {name: value for name, value in defaults.items() if value is not None}
    return given | (dict.fromkeys(_FORMS_OF_LAMBDA) if "lr_lambda" in defaults else {})


def _entry(
    chosen: FieldDescriptor, defaults: Mapping[str, Value | None], texts: Mapping[str, str]
) -> CatalogueEntry:
    message = kind_of(chosen)
    return CatalogueEntry(
        name=message.name,
        field=chosen.name,
        help=texts[message.name],
        hyperparameters=[
            Hyperparameter(
                name=field.name,
                type=_type(field),
                default=json.dumps(defaults[field.name]) if field.name in defaults else None,
                constraint=constraint_of(field),
                help=texts[f"{message.name}.{field.name}"],
            )
            for field in message.fields
        ],
    )


def _type(field: FieldDescriptor) -> str:
    name = field.message_type or field.enum_type
    return (name.name if name else _TYPES[field.type]) + ("[]" if field.is_repeated else "")
