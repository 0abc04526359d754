"""NumPy arrays to tensors of the contract, and back, without ever changing a value.

NumPy has no bfloat16. Here a BF16 tensor is an array of the data type ``BF16``, a record of two
bytes: NumPy refuses to calculate with it, so nobody adds bit patterns by mistake. ``to_bfloat16``
and ``from_bfloat16`` convert, and ``array.view(numpy.uint16)`` shows the bits. Arrays of
``ml_dtypes.bfloat16`` are accepted as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optserve.v1.tensor_pb2 import DataType, Tensor, TensorHeader
from optserve.wire import byte_count, data_type_name
from optserve_client.errors import DataTypeMismatchError, ProtocolError, ShapeMismatchError

Array: TypeAlias = NDArray[Any]

BF16 = np.dtype([("bfloat16", "<u2")])
"""Data type of BF16 tensors: the upper half of a float32, as a record."""

DTYPES: dict[DataType.ValueType, np.dtype[Any]] = {
    DataType.DATA_TYPE_BOOL: np.dtype("?"),
    DataType.DATA_TYPE_UINT8: np.dtype("u1"),
    DataType.DATA_TYPE_INT8: np.dtype("i1"),
    DataType.DATA_TYPE_INT16: np.dtype("<i2"),
    DataType.DATA_TYPE_INT32: np.dtype("<i4"),
    DataType.DATA_TYPE_INT64: np.dtype("<i8"),
    DataType.DATA_TYPE_FP16: np.dtype("<f2"),
    DataType.DATA_TYPE_FP32: np.dtype("<f4"),
    DataType.DATA_TYPE_FP64: np.dtype("<f8"),
    DataType.DATA_TYPE_BF16: BF16,
}
"""NumPy's data type for each of the contract's: little-endian, as on the wire."""

_DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}


def tensor(array: ArrayLike) -> Tensor:
    """Return a small array as a message, for instance as the class weights of a loss.

    Raises:
        DataTypeMismatchError: No tensor can have the array's data type.
    """
    header, data = encode("", array)
    return messages([header], [data])[0]


def from_tensor(message: Tensor) -> Array:
    """Return the read-only array that a message holds, without copying it.

    Raises:
        ProtocolError: The message does not hold as many bytes as its shape and data type need.
    """
    header = message.header
    data = message.data  # copy: message to bytes; the array is a view of them.
    if header.data_type not in DTYPES or len(data) != byte_count(header):
        raise ProtocolError(
            f"tensor '{header.name}' has {len(data)} bytes, which is not what its header says"
        )
    return np.frombuffer(data, DTYPES[header.data_type]).reshape(tuple(header.shape))


def to_bfloat16(array: NDArray[np.float32]) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.asarray(array)
    if values.dtype != np.float32:
        raise DataTypeMismatchError.local(
            f"only float32 rounds to bfloat16; the array has {values.dtype}",
            expected="float32",
            actual=str(values.dtype),
        )
    bits = np.asarray(values, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN whose payload lies in the lower half would round to infinity: keep its upper half, and
    # make it quiet.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2").view(BF16)


def from_bfloat16(array: Array) -> NDArray[np.float32]:
    """Widen an array of data type ``BF16`` to float32, exactly. Same shape."""
    bits = np.asarray(array).view("<u2").astype("<u4") << np.uint32(16)
    return bits.view(np.float32)


def encode(name: str, array: ArrayLike, *, path: str = "") -> tuple[TensorHeader, memoryview]:
    """Return the tensor's header and its bytes.

    Args:
        name: For the header, and for what an error says.
        array: Anything that NumPy takes as an array. The bytes are a view of it where it is
            contiguous and little-endian; otherwise it is copied once.
        path: Of the tensor in its request, for the ``field`` of an error: "gradients[2]". Empty:
            the name.

    Raises:
        DataTypeMismatchError: No tensor can have the array's data type.
    """
    values = np.asarray(array)
    header = announce(name, values.dtype, values.shape, path=path)
    if header.data_type != DataType.DATA_TYPE_BF16:
        # copy: only of big-endian ones.
        values = values.astype(DTYPES[header.data_type], copy=False)
    return header, bytes_of(values)


def announce(
    name: str, dtype: np.dtype[Any], shape: Sequence[int], *, path: str = ""
) -> TensorHeader:
    """Return the header of a tensor of NumPy's ``dtype``; the arguments are those of ``encode``.

    Raises:
        DataTypeMismatchError: No tensor can have this data type.
    """
    data_type = _data_type_of(dtype)
    if data_type is None:
        names = ", ".join(data_type_name(known) for known in DTYPES)
        raise DataTypeMismatchError.local(
            f"tensor '{name}' has the data type {dtype}; one of {names} can be sent",
            field=f"{path or name}.data_type",
            expected=names,
            actual=str(dtype),
        )
    return TensorHeader(name=name, data_type=data_type, shape=shape)


def encode_as(expected: TensorHeader, array: ArrayLike, *, role: str, path: str) -> memoryview:
    """Return the bytes of an array that must have the data type and the shape of ``expected``.

    Nothing is converted to fit: what would have to round, or to be broadcast, is refused.

    Args:
        expected: Header of the parameter.
        array: As in ``encode``.
        role: What the array is to the parameter, for the message: "gradient".
        path: As in ``encode``.

    Raises:
        DataTypeMismatchError: It has another data type.
        ShapeMismatchError: It has another shape.
    """
    header, data = encode(expected.name, array, path=path)
    if header.data_type != expected.data_type:
        actual, wanted = data_type_name(header.data_type), data_type_name(expected.data_type)
        raise DataTypeMismatchError.local(
            f"{role} '{expected.name}' has the data type {actual}; its parameter has {wanted}",
            field=f"{path}.data_type",
            expected=wanted,
            actual=actual,
        )
    if header.shape != expected.shape:
        actual, wanted = str(tuple(header.shape)), str(tuple(expected.shape))
        raise ShapeMismatchError.local(
            f"{role} '{expected.name}' has shape {actual}; its parameter has {wanted}",
            field=f"{path}.shape",
            expected=wanted,
            actual=actual,
        )
    return data


def form_of(header: TensorHeader) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return NumPy's data type and shape of a tensor, whose data type must be known."""
    return DTYPES[header.data_type], tuple(header.shape)


def messages(headers: Iterable[TensorHeader], tensors: Iterable[memoryview]) -> list[Tensor]:
    """Return whole small tensors as messages."""
    return [
        # copy: tensor to bytes; protobuf copies them once more.
        Tensor(header=header, data=bytes(data))
        for header, data in zip(headers, tensors, strict=True)
    ]


def allocate(headers: Sequence[TensorHeader]) -> list[Array]:
    """Return one uninitialised array for each header, whose data types must be known."""
    return [np.empty(tuple(header.shape), DTYPES[header.data_type]) for header in headers]


def bytes_of(array: Array) -> memoryview:
    """Return the array's bytes, flat and row-major: a view if it is contiguous, else of a copy."""
    flat = np.ascontiguousarray(array).reshape(-1)  # A scalar becomes one element.
    return flat.view(np.uint8).data  # A memoryview cannot be cast if it is empty; an array can.


def _data_type_of(dtype: np.dtype[Any]) -> DataType.ValueType | None:
    if dtype.name == "bfloat16" and dtype.itemsize == 2:  # ml_dtypes', which need not be installed.
        return DataType.DATA_TYPE_BF16
    return _DATA_TYPES.get(dtype.newbyteorder("<"))
