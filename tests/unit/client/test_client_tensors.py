from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.wire import ITEM_BYTES
from optserve_client.errors import DataTypeMismatchError, ProtocolError, ShapeMismatchError
from optserve_client.tensors import (
    BF16,
    DTYPES,
    allocate,
    bytes_of,
    encode,
    encode_as,
    from_bfloat16,
    from_tensor,
    tensor,
    to_bfloat16,
)


def test_every_data_type_of_the_contract_has_a_numpy_one_of_its_size() -> None:
    assert {data_type: dtype.itemsize for data_type, dtype in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(6, dtype=np.float32).reshape(2, 3), id="matrix"),
        pytest.param(np.float64(2.5), id="scalar"),
        pytest.param(np.zeros((0, 3), np.int64), id="nothing"),
        pytest.param(np.arange(6, dtype=np.float32).reshape(2, 3).T, id="transposed"),
        pytest.param(np.arange(12, dtype=np.int16)[::-2], id="reversed-stride"),
        pytest.param(np.arange(4, dtype=">f8"), id="big-endian"),
        pytest.param(np.array([True, False]), id="bool"),
        pytest.param(np.array([1, 0x3F80], np.uint16).view(BF16), id="bfloat16"),
    ],
)
def test_an_array_comes_back_as_it_went(array: NDArray[Any]) -> None:
    back = from_tensor(tensor(array))
    assert back.shape == np.shape(array)
    assert back.tolist() == np.asarray(array).tolist()
    assert back.dtype == np.asarray(array).dtype.newbyteorder("<")


def test_a_contiguous_array_is_not_copied() -> None:
    array = np.zeros((3, 4), np.float32)
    _, data = encode("w", array)
    array[0, 0] = 1
    assert bytes(data[:4]) == np.float32(1).tobytes()


def test_what_is_received_is_written_into_the_array_itself() -> None:
    header = TensorHeader(data_type=DataType.DATA_TYPE_BF16, shape=[2])
    (array,) = allocate([header])
    bytes_of(array)[:] = b"\x80\x3f\x00\x40"
    assert from_bfloat16(array).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros(1, np.complex64), id="complex"),
        pytest.param(np.array(["text"]), id="text"),
        pytest.param(np.zeros(1, np.uint16), id="uint16"),
        pytest.param(np.array([object()]), id="object"),
    ],
)
def test_an_array_that_no_tensor_can_hold_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(DataTypeMismatchError, match="tensor 'w' has the data type") as refused:
        encode("w", array)
    assert refused.value.reason == "DATA_TYPE_MISMATCH"


def test_a_gradient_of_another_precision_is_refused_and_not_rounded() -> None:
    header = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[2])
    with pytest.raises(DataTypeMismatchError, match="FP64; its parameter has FP32") as refused:
        encode_as(header, [1.0, 2.0], role="gradient", path="gradients[0]")
    assert (refused.value.field, refused.value.expected) == ("gradients[0].data_type", "FP32")


def test_a_gradient_of_another_shape_is_refused_and_not_broadcast() -> None:
    header = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP64, shape=[2, 1])
    with pytest.raises(ShapeMismatchError) as refused:
        encode_as(header, [1.0, 2.0], role="gradient", path="gradients[0]")
    assert str(refused.value) == "gradient 'w' has shape (2,); its parameter has (2, 1)"


def test_a_message_with_too_few_bytes_is_refused() -> None:
    message = tensor(np.zeros(3))
    message.data = message.data[:-1]
    with pytest.raises(ProtocolError, match="23 bytes"):
        from_tensor(message)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=64))
def test_rounding_to_bfloat16_is_torchs(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    rounded = to_bfloat16(values)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    nan = np.isnan(values)
    assert np.isnan(from_bfloat16(rounded)[nan]).all()
    assert (rounded.view(np.uint16) == expected.view(torch.uint16).numpy())[~nan].all()
    assert np.array_equal(from_bfloat16(rounded)[~nan], expected.to(torch.float32).numpy()[~nan])


def test_only_float32_is_rounded_to_bfloat16() -> None:
    with pytest.raises(DataTypeMismatchError, match="float64"):
        to_bfloat16(np.zeros(2))  # type: ignore[arg-type]


def test_numpy_does_not_calculate_with_bfloat16() -> None:
    ones = to_bfloat16(np.ones(2, np.float32))
    with pytest.raises(TypeError):
        ones + ones
