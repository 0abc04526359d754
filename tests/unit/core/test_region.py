"""Shared memory: sealed, aligned, gone with the last who looks at it."""

from __future__ import annotations

import gc
import math
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.norms import norm_of
from optserve_server.core.region import TOKEN_BYTES, Region, RegionUnavailableError
from optserve_server.core.session import Session
from optserve_server.core.tensors import TensorSpec
from optserve_server.rpc.decode_spec import session_spec

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memfd_create is of Linux"
)

SPECS = [
    TensorSpec(name="weight", dtype=torch.float32, shape=(5, 7)),
    TensorSpec(name="scalar", dtype=torch.float64, shape=()),
    TensorSpec(name="nothing", dtype=torch.float32, shape=(0, 3)),
    TensorSpec(name="bias", dtype=torch.bfloat16, shape=(33,)),
]
OFFSETS = [64, 64 + 192, 64 + 256, 64 + 256]
BYTE_COUNT = 64 + 256 + 128


def opened(region: Region, flags: int = os.O_RDWR) -> int:
    """Open a region as another process would."""
    return os.open(f"/proc/{os.getpid()}/fd/{region.descriptor}", flags)


@contextmanager
def mapped(region: Region, prot: int = mmap.PROT_READ) -> Iterator[mmap.mmap]:
    """Map a region as another process would."""
    descriptor = opened(region)
    try:
        with mmap.mmap(descriptor, region.byte_count, prot=prot) as memory:
            yield memory
    finally:
        os.close(descriptor)


def regions_here() -> int:
    """Count the descriptors and the mappings of this process that are regions."""
    gc.collect()
    links = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("memfd:optserve" in link for link in links) + Path(
        "/proc/self/maps"
    ).read_text().count("memfd:optserve")


@pytest.mark.parametrize("read_only", [False, True], ids=["for-both", "for-readers"])
def test_tensors_stand_where_the_contract_says(read_only: bool) -> None:
    region = Region(SPECS, read_only=read_only)
    assert region.byte_count == BYTE_COUNT
    for number, (tensor, spec) in enumerate(zip(region.tensors, SPECS, strict=True), 1):
        assert tensor.dtype == spec.dtype
        assert tuple(tensor.shape) == spec.shape
        assert not tensor.any()
        tensor.fill_(number)
    with mapped(region) as memory:
        assert memory[:TOKEN_BYTES] == region.token
        assert not any(memory[TOKEN_BYTES:64])
        for number, (offset, spec) in enumerate(zip(OFFSETS, SPECS, strict=True), 1):
            data = memory[offset : offset + spec.byte_count]
            assert (
                data
                == torch.full(spec.shape, number, dtype=spec.dtype)
                .reshape(-1)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )


def test_what_a_client_writes_is_in_the_tensor() -> None:
    region = Region(SPECS, read_only=False)
    with mapped(region, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        memory[64:68] = torch.tensor(2.5).numpy().tobytes()
    assert region.tensors[0][0, 0] == 2.5


@pytest.mark.parametrize("byte_count", [0, 4096, 1 << 20], ids=["nothing", "less", "more"])
@pytest.mark.parametrize("read_only", [False, True], ids=["for-both", "for-readers"])
def test_nobody_can_change_its_size(read_only: bool, byte_count: int) -> None:
    specs = [TensorSpec(name="large", dtype=torch.float32, shape=(10_000,))]
    region = Region(specs, read_only=read_only)
    descriptor = opened(region)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, byte_count)
    finally:
        os.close(descriptor)
    assert not region.tensors[0].any()


def test_a_client_cannot_write_what_is_for_readers() -> None:
    region = Region(SPECS, read_only=True)
    descriptor = opened(region)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 64)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, region.byte_count)
    finally:
        os.close(descriptor)
    region.tensors[0].fill_(1)  # The server itself still can.
    assert region.tensors[0].all()


def test_no_other_user_may_open_it() -> None:
    region = Region(SPECS, read_only=False)
    assert os.fstat(region.descriptor).st_mode & 0o7777 == 0o600


def test_a_closed_region_cannot_be_found_but_lives_on_for_those_who_have_it() -> None:
    before = regions_here()
    region = Region(SPECS, read_only=False)
    with mapped(region) as memory:
        tensor = region.tensors[0]
        region.close()
        with pytest.raises(FileNotFoundError):
            opened(region)
        del region
        tensor.fill_(1)
        assert memory[64:68] == torch.tensor(1.0).numpy().tobytes()
    assert regions_here() > before
    del tensor
    assert regions_here() == before


def test_a_forgotten_region_leaves_nothing() -> None:
    before = regions_here()
    for _ in range(50):
        Region(SPECS, read_only=True)
    assert regions_here() == before


def test_no_region_is_made_of_the_upper_half_of_the_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = Region(SPECS, read_only=False)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * kept.descriptor, hard))
        with pytest.raises(RegionUnavailableError, match="descriptors"):
            Region(SPECS, read_only=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_session_steps_in_shared_memory_as_in_its_own() -> None:
    headers = [
        TensorHeader(name="weight", data_type=DataType.DATA_TYPE_FP32, shape=(1001, 3)),
        TensorHeader(name="bias", data_type=DataType.DATA_TYPE_FP32, shape=(7,)),
    ]
    spec = session_spec(
        SessionSpec(parameters=headers, optimizer=Optimizer(adam=Adam(lr=0.1))), Limits()
    )
    own, shared = (Session(spec, Device("cpu"), Limits()) for _ in range(2))
    torch.manual_seed(0)
    values = {i: torch.randn(*header.shape) for i, header in enumerate(headers)}
    for session in (own, shared):
        session.set_parameters(values)
    region = shared.share()
    assert [each.data_ptr() for each in shared.parameters] == [
        each.data_ptr() for each in region.tensors
    ]
    for step in range(1, 5):
        gradients = [torch.randn(*header.shape) for header in headers]
        outcomes = [session.step([each.clone() for each in gradients]) for session in (own, shared)]
        assert outcomes[0] == outcomes[1]
        assert outcomes[0].step == step
        assert shared.share() is region
        for mine, theirs in zip(own.parameters, region.tensors, strict=True):
            assert torch.equal(mine, theirs)


def test_the_norm_of_gradients_is_the_same_in_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.get_num_threads()
    try:
        for count in (100, 16_383, 16_384, 40_000, 65_537, 300_001, 1_500_000):
            gradient = torch.randn(count, generator=generator)
            norms = set()
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                norms.add(norm_of([gradient, gradient[: count // 2]]))
            assert len(norms) == 1, count
    finally:
        torch.set_num_threads(before)


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5_000_011), None, torch.randn(3, 5)]
    exact = sum(each.double().square().sum().item() for each in gradients if each is not None)
    assert norm_of(gradients) == pytest.approx(exact**0.5, rel=1e-6)


def test_the_norm_of_a_large_gradient_tells_a_nan_anywhere() -> None:
    for position in (0, 2_500_000, 5_000_010):
        gradient = torch.zeros(5_000_011)
        gradient[position] = torch.nan
        assert math.isnan(norm_of([gradient]))


def test_the_norm_of_gradients_side_by_side_is_that_of_all_of_them() -> None:
    specs = [
        TensorSpec(name=str(i), dtype=torch.float32, shape=(elements,))
        for i, elements in enumerate((700_001, 1, 900_003))
    ]
    shared = Region(specs, read_only=False).tensors
    torch.manual_seed(0)
    for tensor in shared:
        tensor.normal_()
    apart = [tensor.clone() for tensor in shared]
    assert norm_of(shared) == pytest.approx(norm_of(apart), rel=1e-5)
    for tensor in shared:
        last = tensor[-1].clone()
        tensor[-1] = 1e6
        assert norm_of(shared) == pytest.approx(1e6, rel=1e-3)
        tensor[-1] = last
    # One of them is absent, and another is elsewhere: what lies between does not count.
    assert norm_of([shared[0], None, shared[2]]) == pytest.approx(
        norm_of([apart[0], apart[2]]), rel=1e-5
    )
    assert norm_of([shared[0], apart[1], shared[2]]) == pytest.approx(norm_of(apart), rel=1e-5)
