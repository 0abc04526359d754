"""The client maps the server's memory, or says why it cannot."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve_client._region import Region, RegionError
from optserve_client.tensors import BF16
from optserve_server.core import region as server_region
from optserve_server.core.tensors import TensorSpec

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memfd_create is of Linux"
)

HEADERS = [
    TensorHeader(name="weight", data_type=DataType.DATA_TYPE_FP32, shape=(5, 7)),
    TensorHeader(name="scalar", data_type=DataType.DATA_TYPE_FP64, shape=()),
    TensorHeader(name="nothing", data_type=DataType.DATA_TYPE_FP32, shape=(0, 3)),
    TensorHeader(name="bias", data_type=DataType.DATA_TYPE_BF16, shape=(33,)),
]
SPECS = [
    TensorSpec(name="weight", dtype=torch.float32, shape=(5, 7)),
    TensorSpec(name="scalar", dtype=torch.float64, shape=()),
    TensorSpec(name="nothing", dtype=torch.float32, shape=(0, 3)),
    TensorSpec(name="bias", dtype=torch.bfloat16, shape=(33,)),
]


@pytest.fixture
def offered() -> Iterator[server_region.Region]:
    """Yield a region of the server, which is this process."""
    region = server_region.Region(SPECS, read_only=False)
    yield region
    region.close()


def path_of(descriptor: int) -> Path:
    """Return where another process finds a file that is open here."""
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def test_both_sides_see_the_same_tensors(offered: server_region.Region) -> None:
    region = Region(path_of(offered.descriptor), offered.token, HEADERS, writable=True)
    weight, scalar, nothing, bias = region.arrays
    weight[4, 6] = 2.5
    scalar[...] = 7.0
    bias.view(np.uint16)[32] = 0x3FC0
    assert offered.tensors[0][4, 6] == 2.5
    assert offered.tensors[1] == 7.0
    assert nothing.shape == (0, 3)
    assert bias.dtype == BF16
    assert offered.tensors[3][32] == 1.5
    offered.tensors[0].fill_(3)
    assert (weight == 3).all()


def test_what_is_for_readers_cannot_be_written() -> None:
    offered = server_region.Region(SPECS, read_only=True)
    path = path_of(offered.descriptor)
    region = Region(path, offered.token, HEADERS, writable=False)
    assert not any(array.flags.writeable for array in region.arrays)
    offered.tensors[0].fill_(3)
    assert (region.arrays[0] == 3).all()
    with pytest.raises(RegionError, match="not permitted"):
        Region(path, offered.token, HEADERS, writable=True)


def test_the_arrays_outlive_the_server(offered: server_region.Region) -> None:
    region = Region(path_of(offered.descriptor), offered.token, HEADERS, writable=True)
    weight = region.arrays[0]
    weight[0, 0] = 1
    offered.close()
    offered.tensors.clear()
    del region
    gc.collect()
    assert weight[0, 0] == 1


@pytest.mark.parametrize("token", [b"", b"\x00" * 16, b"x" * 16, b"x" * 1_000_000])
def test_another_token_is_another_servers_memory(
    offered: server_region.Region, token: bytes
) -> None:
    with pytest.raises(RegionError, match="another server's"):
        Region(path_of(offered.descriptor), token, HEADERS, writable=True)


def test_memory_of_another_size_is_not_mapped(offered: server_region.Region) -> None:
    with pytest.raises(RegionError, match="bytes"):
        Region(path_of(offered.descriptor), offered.token, HEADERS[:1], writable=True)


def test_what_is_no_memory_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR)
    try:
        with pytest.raises(RegionError, match="other ids"):
            Region(path_of(descriptor), b"x" * 16, HEADERS, writable=False)
    finally:
        os.close(descriptor)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(RegionError, match="No such file"):
        Region(path_of(1_000_000), b"x" * 16, HEADERS, writable=True)


def test_a_region_that_is_forgotten_leaves_nothing(offered: server_region.Region) -> None:
    def count() -> int:
        gc.collect()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:optserve")
        return len(list(Path("/proc/self/fd").iterdir())) + maps

    before = count()
    for _ in range(50):
        Region(path_of(offered.descriptor), offered.token, HEADERS, writable=True)
    assert count() == before
