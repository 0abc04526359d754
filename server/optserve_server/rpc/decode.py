"""Messages into the core's values: checked once, on the way in, into types that cannot be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from optserve.v1 import session_pb2, tensor_pb2
from optserve.wire import data_type_name
from optserve_server.core.errors import (
    ByteCountMismatchError,
    InvalidFieldError,
    InvalidNameError,
    LimitExceededError,
)
from optserve_server.core.limits import Limits
from optserve_server.core.spec import Encoding, Split
from optserve_server.core.tensors import DTYPES, TensorSpec
from optserve_server.rpc.encoded import byte_count

_T = TypeVar("_T")

_ELEMENTS_MAX = 1 << 62  # torch counts elements in 63 bits, also where a dimension is zero.
_POSITIONS_SHOWN = 5  # How many of them an error shows.
_CLIENT_ID_BYTES = 16  # 128 random bits: nobody meets another's by chance.
_SPLITS: Mapping[int, Split] = {
    session_pb2.SPLIT_UNSPECIFIED: Split.NONE,
    session_pb2.SPLIT_TRAIN: Split.TRAIN,
    session_pb2.SPLIT_VALIDATION: Split.VALIDATION,
}
_NON_FINITE: Mapping[int, bool] = {
    session_pb2.NON_FINITE_POLICY_REFUSE: False,
    session_pb2.NON_FINITE_POLICY_ALLOW: True,
}


def tensor_specs(
    headers: Sequence[tensor_pb2.TensorHeader], limits: Limits, field: str
) -> list[TensorSpec]:
    """Decode a list of announced tensors with unique names.

    Raises:
        OptserveError: There are none or too many, or one of them is not allowed.
    """
    check_tensor_count(len(headers), limits, field)
    specs = [tensor_spec(header, limits, f"{field}[{i}]") for i, header in enumerate(headers)]
    seen: set[str] = set()
    for i, spec in enumerate(specs):
        check_name(spec.name, limits, f"{field}[{i}].name")
        if spec.name in seen:
            raise InvalidNameError(
                f"{spec.name!r} is there twice", field=f"{field}[{i}].name", actual=spec.name
            )
        seen.add(spec.name)
    return specs


def check_tensor_count(count: int, limits: Limits, field: str) -> None:
    """Make sure that there are not more tensors than a session may have.

    Raises:
        LimitExceededError: There are.
    """
    if count > limits.parameters_max:
        raise LimitExceededError(
            f"{count} tensors are announced; a session may have {limits.parameters_max}",
            field=field,
            expected=f"at most {limits.parameters_max}",
            actual=count,
        )


def tensor_spec(header: tensor_pb2.TensorHeader, limits: Limits, field: str) -> TensorSpec:
    """Decode what one tensor is; its name is not looked at.

    Raises:
        OptserveError: Its data type or shape is not allowed.
    """
    dtype = DTYPES.get(_data_type_name(header.data_type))
    if dtype is None:
        raise InvalidFieldError(
            "a tensor needs a data type",
            field=f"{field}.data_type",
            expected=", ".join(DTYPES),
            actual=header.data_type,
        )
    shape = tuple(header.shape)
    if len(shape) > limits.dimensions_max:
        raise LimitExceededError(
            f"a tensor has {len(shape)} dimensions; {limits.dimensions_max} are allowed",
            field=f"{field}.shape",
            expected=f"at most {limits.dimensions_max} dimensions",
            actual=f"{len(shape)} dimensions",
        )
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > _ELEMENTS_MAX:
        raise InvalidFieldError(
            f"{shape} is no shape", field=f"{field}.shape", expected="sizes from 0", actual=shape
        )
    return TensorSpec(name=header.name, dtype=dtype, shape=shape)


def tensor(message: tensor_pb2.Tensor, limits: Limits, field: str) -> torch.Tensor:
    """Decode a whole tensor, as one of its own memory.

    Raises:
        OptserveError: Its header is not allowed, or its bytes are too few or too many.
    """
    spec = tensor_spec(message.header, limits, f"{field}.header")
    data = message.data
    check_byte_count(spec, len(data), f"{field}.data")
    if not data:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(data), dtype=spec.dtype).reshape(spec.shape)


def check_byte_count(
    spec: TensorSpec, count: int, field: str, encoding: Encoding = Encoding.PLAIN
) -> None:
    """Make sure that a tensor has as many bytes as its shape and data type, or encoding, need.

    Raises:
        ByteCountMismatchError: It has not.
    """
    expected = byte_count(spec, encoding)
    if count != expected:
        encoded = "" if encoding is Encoding.PLAIN else f" in {encoding}"
        raise ByteCountMismatchError(
            f"a tensor of shape {spec.shape} has {expected} bytes{encoded}; {count} came",
            field=field,
            expected=f"{expected} bytes",
            actual=f"{count} bytes",
        )


def positions(values: Sequence[int], count: int, field: str) -> Sequence[int]:
    """Return positions among ``count`` parameters, each of which is there at most once.

    Raises:
        InvalidFieldError: One is none, or there are too many.
    """
    many = len(values) > count  # Looked at first: a set of millions takes its time.
    if many or len(set(values)) < len(values) or max(values, default=0) >= count:
        raise InvalidFieldError(
            f"positions are from 0 to {count - 1}, each once at most",
            field=field,
            expected=f"different numbers below {count}",
            actual=", ".join(map(str, values[:_POSITIONS_SHOWN])),
        )
    return values


def split(value: int) -> Split:
    """Decode a split.

    Raises:
        InvalidFieldError: There is none of this number.
    """
    return enum(_SPLITS, value, "split")


def non_finite(value: int, field: str) -> bool | None:
    """Decode a policy as whether to allow; None where it is not set.

    Raises:
        InvalidFieldError: There is none of this number.
    """
    if value == session_pb2.NON_FINITE_POLICY_UNSPECIFIED:
        return None
    return enum(_NON_FINITE, value, field)


def digest(value: bytes, limits: Limits) -> bytes:
    """Decode what identifies the content of a step; empty: nothing does.

    Raises:
        LimitExceededError: It is too long.
    """
    if len(value) > limits.digest_bytes_max:
        raise LimitExceededError(
            f"a digest has {len(value)} bytes; {limits.digest_bytes_max} are allowed",
            field="digest",
            expected=f"at most {limits.digest_bytes_max} bytes",
            actual=f"{len(value)} bytes",
        )
    return value


def client_id(value: bytes, field: str) -> bytes:
    """Decode what names a client; empty: one that does not say.

    Raises:
        InvalidFieldError: It is neither empty nor of the right length.
    """
    if value and len(value) != _CLIENT_ID_BYTES:
        raise InvalidFieldError(
            f"a client's id has {_CLIENT_ID_BYTES} bytes",
            field=field,
            expected=f"{_CLIENT_ID_BYTES} bytes, or none",
            actual=f"{len(value)} bytes",
        )
    return value


def display_name(name: str, limits: Limits, field: str) -> str:
    """Decode a name for people, which may be empty.

    Raises:
        InvalidNameError: It is too long, or holds control characters.
    """
    if name:
        check_name(name, limits, field)
    return name


def page(page_size: int, page_token: str, size_max: int) -> tuple[int, int]:
    """Decode where a page begins and how long it is: the number to go on after, and the count.

    Raises:
        InvalidFieldError: The token is none of ours.
    """
    if page_token and not (
        page_token.isascii() and page_token.isdecimal() and len(page_token) < 20
    ):
        raise InvalidFieldError(
            "the page token is not one that this server gave",
            field="page_token",
            expected="next_page_token of the page before",
            actual=page_token,
        )
    return int(page_token or 0), min(page_size or size_max, size_max)


def check_name(name: str, limits: Limits, field: str) -> None:
    """Make sure that a name can be shown, and is not too long.

    Raises:
        OptserveError: It cannot, or is.
    """
    count = len(name.encode())
    if count > limits.name_bytes_max:
        raise LimitExceededError(
            f"a name has {count} bytes; {limits.name_bytes_max} are allowed",
            field=field,
            expected=f"at most {limits.name_bytes_max} bytes",
            actual=f"{count} bytes",
        )
    if not name or not name.isprintable():
        raise InvalidNameError(
            f"{name!r} is no name",
            field=field,
            expected="printable characters, at least one",
            actual=repr(name),
        )


def enum(table: Mapping[int, _T], value: int, field: str) -> _T:
    """Look an enum's value up.

    Raises:
        InvalidFieldError: There is none of this number.
    """
    if value not in table:
        raise InvalidFieldError(
            f"{field} has no value {value}", field=field, expected=sorted(table), actual=value
        )
    return table[value]


def _data_type_name(value: int) -> str:
    known = value in tensor_pb2.DataType.values()
    return data_type_name(value) if known else ""  # type: ignore[arg-type]
