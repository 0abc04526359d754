"""The exam's documents to this client's values, and back."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import Message

import optserve_client as optserve
from optserve.v1.tensor_pb2 import Tensor
from optserve.wire import data_type_name
from optserve_client import lr_scheduler, nn, optim
from optserve_client.tensors import BF16, DTYPES, Array, announce, bytes_of, from_tensor

Document: TypeAlias = Mapping[str, Any]
"""An object of JSON."""

_DTYPES = {data_type_name(data_type): dtype for data_type, dtype in DTYPES.items()}
_SPECIAL_NUMBERS = ("NaN", "Infinity", "-Infinity")


class MisspeltError(Exception):
    """A hyperparameter that no message has: its constructor refuses it by name."""


def array(document: Document) -> Array:
    """Return the array of a tensor whose elements are given."""
    dtype, shape = _DTYPES[document["data_type"]], tuple(document["shape"])
    if "pattern" not in document:
        return np.frombuffer(base64.b64decode(document["data"]), dtype).reshape(shape)
    at = document["pattern"]
    i = np.arange(math.prod(shape), dtype=np.int64)
    values = (i * at["multiply"] + at["add"]) % at["modulo"] - at["subtract"]
    exact = (values / at["divide"]).reshape(shape)
    return optserve.to_bfloat16(exact.astype(np.float32)) if dtype == BF16 else exact.astype(dtype)


def arrays(documents: Iterable[Document]) -> dict[str, Array]:
    """Return the arrays of named tensors."""
    return {document["name"]: array(document) for document in documents}


def parameters(documents: Iterable[Document]) -> dict[str, Array | optserve.Placeholder]:
    """Return a new session's parameters: values, and placeholders for those without one."""
    return {
        document["name"]: array(document)
        if document.keys() & {"data", "pattern"}
        else optserve.Placeholder(shape=document["shape"], dtype=_DTYPES[document["data_type"]])
        for document in documents
    }


def options(document: Document) -> dict[str, Any]:
    """Return the keyword arguments of a SessionSpec without parameters, or of an update."""
    read: dict[str, Callable[[Any], Document]] = {
        "display_name": lambda name: {"display_name": name},
        "optimizer": lambda choice: {"optimizer": _chosen(optim, choice)},
        "groups": lambda groups: {"groups": [_group(group) for group in groups]},
        "scheduler": _scheduler,
        "loss": lambda choice: {"loss": _chosen(nn, choice)},
        "workers": lambda workers: {"workers": workers},
        "non_finite": lambda policy: {"allow_non_finite": {"ALLOW": True, "REFUSE": False}[policy]},
        "limits": dict,
        "wire": lambda wire: {"wire": optserve.Wire(**wire)},
    }
    return {
        name: value for key, part in document.items() for name, value in read[key](part).items()
    }


def tensor_document(values: Array, name: str | None = None) -> Document:
    """Return the document of a tensor, with its bytes and their hash."""
    header = announce("", values.dtype, values.shape)
    data = bytes(bytes_of(values))
    return {
        **({} if name is None else {"name": name}),
        "data_type": data_type_name(header.data_type),
        "shape": list(header.shape),
        "data": base64.b64encode(data).decode("ascii"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def document(message: Message) -> Document:
    """Return the document of one of the contract's messages: what is unset is left out."""
    if isinstance(message, Tensor):
        return tensor_document(from_tensor(message))
    read: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        enum_names = [each.name for each in field.enum_type.values] if field.enum_type else []
        if field.name == "rates":
            read["rates"] = {rate.group: rate.lr for rate in value}
        elif field.is_repeated:
            read[field.name] = [_value(element, enum_names) for element in value]
        elif not field.has_presence or message.HasField(field.name):
            read[field.name] = _value(value, enum_names)
    return read


def mismatch(expected: Any, actual: Any, path: str = "") -> str | None:  # noqa: ANN401  (JSON)
    """Say where an answer is not what must come; None if it is."""
    match expected:
        case None:
            return None if actual is None else f"{path}: expected nothing, got {actual!r}"
        case dict():
            if not isinstance(actual, Mapping):
                return f"{path}: expected an object, got {actual!r}"
            parts = (
                mismatch(part, actual.get(key), f"{path}.{key}".lstrip("."))
                for key, part in expected.items()
            )
        case list():
            if not isinstance(actual, Sequence) or len(actual) != len(expected):
                return f"{path}: expected {len(expected)} elements, got {actual!r}"
            parts = (mismatch(part, actual[i], f"{path}[{i}]") for i, part in enumerate(expected))
        case _:
            return (
                None
                if _same(expected, actual)
                else f"{path}: expected {expected!r}, got {actual!r}"
            )
    return next((problem for problem in parts if problem), None)


def _same(expected: object, actual: object) -> bool:
    if expected in _SPECIAL_NUMBERS and isinstance(actual, float):
        return str(float(str(expected))) == str(actual)
    return isinstance(expected, bool) == isinstance(actual, bool) and expected == actual


def _chosen(module: Any, choice: Document) -> Any:  # noqa: ANN401  (Of any module.)
    """Return the message that ``{"adam": {"lr": 0.1}}`` stands for."""
    ((arm, hyperparameters),) = choice.items()
    kinds = {name.lower(): getattr(module, name) for name in module.__all__}
    kind = kinds[arm.replace("_", "")]
    values = {name: _hyperparameter(name, value) for name, value in hyperparameters.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise MisspeltError(str(error)) from error


def _hyperparameter(name: str, value: Any) -> Any:  # noqa: ANN401  (JSON)
    if name == "reduction":
        return nn.Reduction.Value(f"REDUCTION_{value}")
    if name == "weight":
        return optserve.tensor(array(value))
    return float(value) if value in _SPECIAL_NUMBERS else value


def _group(group: Document) -> optserve.ParameterGroup:
    overrides = group.get("overrides")
    return optserve.ParameterGroup(
        **{key: part for key, part in group.items() if key != "overrides"},
        overrides=None if overrides is None else _chosen(optim, overrides),
    )


def _scheduler(choice: Document) -> Document:
    kind = {arm: part for arm, part in choice.items() if arm != "unit"}
    unit = {"schedule_unit": choice["unit"].lower()} if "unit" in choice else {}
    return {"scheduler": _chosen(lr_scheduler, kind), **unit}


def _value(value: Any, enum_names: Sequence[str]) -> Any:  # noqa: ANN401  (Of any field.)
    if isinstance(value, Message):
        return document(value)
    if enum_names:  # Ours are numbered from 0, which is UNSPECIFIED and shows the others' prefix.
        return enum_names[value].removeprefix(enum_names[0].removesuffix("UNSPECIFIED"))
    return value
