"""Encoded tensors in the client's state machine: what is kept of gradients, what is not taken."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import DataType, Encoding, TensorHeader
from optserve.wire import whole
from optserve_client import Wire, WireEncoding, optim
from optserve_client._digest import StepDigest
from optserve_client._encoded import GradientSources
from optserve_client._exchange import PackedStep
from optserve_client._incoming import arrays_of
from optserve_client._spec import session_spec
from optserve_client.errors import ProtocolError

BF16, INT8_BLOCKS = Encoding.ENCODING_BF16, Encoding.ENCODING_INT8_BLOCKS
W = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[2])


def sent(sources: GradientSources, step: int, *gradient: float) -> bytes:
    """Return the bytes of a step's only gradient."""
    values = np.array(gradient, np.float32)
    (source,) = sources.of(step, StepDigest(["w"]), ["w"], [values.view(np.uint8).data])
    return whole(source)


def codes(data: bytes) -> list[int]:
    found: list[int] = np.frombuffer(data[4:], np.int8).tolist()
    return found


def received(
    encoding: Encoding.ValueType, data: bytes, reference: list[NDArray[np.float32]] | None = None
) -> list[float]:
    (values,) = arrays_of([W], [data], encoding, reference)
    assert not values.flags.writeable
    found: list[float] = values.tolist()
    return found


def test_what_int8_rounds_away_is_sent_with_the_next_gradient() -> None:
    sources = GradientSources(INT8_BLOCKS)
    seen = []
    for step in (1, 2, 3, 4):
        seen.append(codes(sent(sources, step, 127, 0.3)))
        sources.answered(step)
    assert seen == [[127, 0], [127, 1], [127, 0], [127, 0]]  # Of 0.3, 0.6, -0.1 and 0.2.


def test_a_step_that_is_taken_again_is_sent_with_the_same_bytes() -> None:
    sources = GradientSources(INT8_BLOCKS)
    sent(sources, 1, 127, 0.3)
    sources.answered(1)
    first = sent(sources, 2, 127, 0.3)
    assert sent(sources, 2, 127, 0.3) == first
    sources.answered(2)
    sent(sources, 2, 127, 0.45)  # A replay of an answered step: the server does not use it.
    sources.answered(2)
    assert codes(sent(sources, 3, 127, 0.3)) == [127, 0]


def test_a_step_that_was_applied_though_its_answer_was_lost_counts_with_the_next_one() -> None:
    sources = GradientSources(INT8_BLOCKS)
    sent(sources, 1, 127, 0.3)
    assert codes(sent(sources, 2, 127, 0.3)) == [127, 1]


def test_a_parameter_without_a_gradient_keeps_what_it_has() -> None:
    sources = GradientSources(INT8_BLOCKS)
    sent(sources, 1, 127, 0.3)
    sources.answered(1)
    sources.of(2, StepDigest(["w"]), [], [])
    sources.answered(2)
    assert codes(sent(sources, 3, 127, 0.3)) == [127, 1]


def test_a_gradient_that_is_not_finite_leaves_nothing_behind() -> None:
    sources = GradientSources(INT8_BLOCKS)
    assert np.isnan(received(INT8_BLOCKS, sent(sources, 1, np.nan, 1), [np.zeros(2, "f4")])).all()
    sources.answered(1)
    assert codes(sent(sources, 2, 127, 1)) == [127, 1]


def test_differences_are_added_to_the_answer_before() -> None:
    data = sent(GradientSources(INT8_BLOCKS), 1, 127, -1)
    reference = [np.array([5, 6], np.float32)]
    assert received(INT8_BLOCKS, data, reference) == [132, 5]
    assert reference[0].tolist() == [5, 6]


def test_differences_to_nothing_are_not_understood() -> None:
    step = PackedStep(1, [], [W], StepDigest(["w"]))
    data = sent(GradientSources(INT8_BLOCKS), 1, 127, -1)
    answer = pb.PackedParameters(
        result=pb.StepResult(step=1), parameters=[data], encoding=INT8_BLOCKS
    )
    with pytest.raises(ProtocolError, match="encoding 3"):
        step.receive(pb.TrainResponse(packed=answer))


def test_bytes_that_do_not_fit_their_encoding_are_not_understood() -> None:
    assert received(BF16, sent(GradientSources(BF16), 1, 1.5, -2)) == [1.5, -2]
    with pytest.raises(ProtocolError, match="8 bytes"):
        received(BF16, bytes(8))
    with pytest.raises(ProtocolError, match="encoding 77"):
        received(77, bytes(4))  # type: ignore[arg-type] # of a server that is newer


@pytest.mark.parametrize("name", ["BF16", "FP16", "INT8_BLOCKS"])
def test_a_spec_names_the_encodings(name: WireEncoding) -> None:
    spec = session_spec([W], optimizer=optim.SGD(lr=1.0), wire=Wire(gradients=name))
    assert spec.wire.gradients == Encoding.Value(f"ENCODING_{name}")
    assert spec.wire.parameters == Encoding.ENCODING_UNSPECIFIED


def test_an_encoding_that_there_is_not_is_refused_by_name() -> None:
    wire = Wire(parameters="INT4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters must be None or one of BF16, FP16, INT8_B"):
        session_spec([W], optimizer=optim.SGD(lr=1.0), wire=wire)
