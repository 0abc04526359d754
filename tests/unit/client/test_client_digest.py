"""What a step is known by: its content, however it travels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from optserve.v1.tensor_pb2 import Encoding
from optserve.wire import Source, split, whole
from optserve_client._digest import DIGEST_BYTES, StepDigest
from optserve_client._encoded import GradientSources

NAMES = ["w", "nothing", "b", "last"]
Gradients: TypeAlias = Mapping[str, NDArray[np.float32]]

CONTENT = {
    "w": np.arange(100_000, dtype=np.float32) - 50_000,
    "nothing": np.zeros(0, np.float32),
    "b": np.ones(7, np.float32),
    "last": np.zeros(33, np.float32),
}


def sources_of(
    gradients: Gradients, encoding: Encoding.ValueType, step: int = 1
) -> tuple[StepDigest, list[Source]]:
    digest = StepDigest(NAMES)
    data = [each.view(np.uint8).data for each in gradients.values()]
    sources = GradientSources(encoding).of(step, digest, list(gradients), data)
    return digest, sources


def digest_of(
    gradients: Gradients, encoding: Encoding.ValueType = Encoding.ENCODING_UNSPECIFIED
) -> bytes:
    digest, sources = sources_of(gradients, encoding)
    for source in sources:
        whole(source)
    return digest.value()


@pytest.mark.parametrize("encoding", Encoding.values(), ids=Encoding.keys())
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1_000, 37])
def test_a_step_is_known_however_it_is_cut_and_encoded(
    encoding: Encoding.ValueType, chunk_bytes: int
) -> None:
    digest, sources = sources_of(CONTENT, encoding)
    for _ in split(sources, chunk_bytes):
        pass
    assert len(digest.value()) == DIGEST_BYTES
    assert digest.value() == digest_of(CONTENT)


def test_a_step_is_known_in_whatever_order_its_gradients_leave() -> None:
    names = list(CONTENT)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert digest_of({name: CONTENT[name] for name in names}) == digest_of(CONTENT)


def without(names: Sequence[str]) -> Gradients:
    return {name: value for name, value in CONTENT.items() if name not in names}


OTHERS: dict[str, Gradients] = {
    "one-bit": CONTENT | {"b": np.nextafter(CONTENT["b"], np.float32(2))},
    "signed-zero": CONTENT | {"last": -CONTENT["last"]},
    "absent": without(["last"]),
    "absent-empty": without(["nothing"]),
    "all-absent": {},
    "moved": CONTENT | {"b": CONTENT["last"], "last": CONTENT["b"]},
    "shifted": CONTENT
    | {"b": CONTENT["b"][:6], "last": np.append(CONTENT["b"][:1], CONTENT["last"])},
}


def test_other_content_is_known_as_such() -> None:
    digests = {digest_of(gradients) for gradients in [CONTENT, *OTHERS.values()]}
    assert len(digests) == 1 + len(OTHERS)


def test_the_same_gradient_is_the_same_whatever_int8_has_lost_before() -> None:
    sources = GradientSources(Encoding.ENCODING_INT8_BLOCKS)
    found = []
    for step in (1, 2, 2):
        digest = StepDigest(["w"])
        gradient = np.array([127, 0.3], np.float32)
        (source,) = sources.of(step, digest, ["w"], [gradient.view(np.uint8).data])
        found.append((digest, whole(source)))
        sources.answered(step)
    assert len({digest.value() for digest, _ in found}) == 1
    assert len({data for _, data in found}) == 2
