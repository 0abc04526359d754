from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import optserve_client
from optserve_client import aio
from optserve_client.config import ClientConfig


def test_all_is_sorted_and_there() -> None:
    assert optserve_client.__all__ == sorted(optserve_client.__all__)
    for name in optserve_client.__all__:
        assert hasattr(optserve_client, name)


@pytest.mark.parametrize("name", ["Client", "Session"])
def test_both_faces_offer_the_same(name: str) -> None:
    blocking, asyncio = getattr(optserve_client, name), getattr(aio, name)
    methods = {each for each in vars(blocking) if not each.startswith("_")}
    assert methods == {each for each in vars(asyncio) if not each.startswith("_")}
    for method in methods:
        parameters = inspect.signature(getattr(blocking, method)).parameters
        assert parameters == inspect.signature(getattr(asyncio, method)).parameters


def test_importing_the_client_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys, optserve_client.aio; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"timeout_s": 0.0},
        {"step_timeout_s": float("inf")},
        {"connect_timeout_s": -1.0},
        {"chunk_bytes": 0},
        {"chunk_bytes": (1 << 20) + 1},
        {"lane": "fast"},
    ],
    ids=str,
)
def test_a_config_without_sense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ClientConfig(**fields)  # type: ignore[arg-type]
